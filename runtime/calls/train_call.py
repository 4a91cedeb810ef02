"""Training calls: one optimizer step per minibatch, with the loss of the algorithm and the role.

Samples stand in the order of `plans.batches.Share`: this replica's part of minibatch 0, then of minibatch 1, ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from plans.algorithms import ALGORITHMS, loss_of
from plans.batches import Share
from plans.errors import RealplanError
from plans.graph import Call
from plans.hyperparameters import Ppo
from runtime.algorithms.kl_control import adapted
from runtime.algorithms.losses import Clip, Loss, counted, kl_loss, policy_loss, value_loss
from runtime.algorithms.offline import dpo_loss, pair_loss, sft_loss
from runtime.batches.reward_functions import load_function
from runtime.calls.experience import Experience, experience
from runtime.calls.forward_calls import Values
from runtime.job import Job
from runtime.models.routing import Balance
from runtime.passes.forward import LossFunction, MicroBatches, TokenOutput
from runtime.passes.packs import Batch
from runtime.passes.training import StepStats, Trainer
from runtime.reports.stats import Stat, merge_stats

_OWN_LOSS = "(output, batch, tokens) -> (loss, {name: term}), both sums over the micro-batch divided by `tokens`"
WEIGHTS = "loss_weights"


def train_call(
    job: Job, call: Call, share: Share, trainer: Trainer, inputs: Mapping[str, Values], responses: Sequence[int],
    iteration: int,
) -> dict[str, Stat]:  # fmt: skip
    """Train a role for one iteration; its metrics, on the ranks that report them. responses: response tokens of every
    sample of the iteration."""
    found = experience(job, call, trainer, inputs, share.samples)
    steps: list[StepStats] = []
    if call.model == "critic" or not _critic_warms_up(job, iteration):
        skip = job.run.on_nonfinite == "skip"
        for m, (part, tokens, cuts) in enumerate(_minibatches(job, found, share, responses)):
            loss, balance = _loss(job, call, found.settings, tokens), _balance(job, call, found, share, m)
            steps.append(trainer.step(part, loss, cuts, job.temperature, skip_nonfinite=skip, balance=balance))
    if found.kl is not None:
        trainer.kl_coefficient = _next_coefficient(job, found.settings, found.kl)
    place = trainer.model.place
    stats: dict[str, Stat] = {}
    if place.tp == place.pp == place.cp == 0:
        if place.dp == 0:
            stats |= _step_stats(call.model, steps)
            if job.plan.workload.graph.staleness and call.model != "critic" and steps and not steps[0].skipped:
                # Before the first step both policies differ by the age of the generation's weights alone.
                aged = {name: steps[0].terms[name] for name in ("ppo_kl", "pg_clipfrac") if name in steps[0].terms}
                stats |= {f"{call.model}/stale_{name}": Stat.one(value) for name, value in aged.items()}
        if call.model != "critic":
            values = {name: Stat.of(value) for name, value in found.report.items()}
            stats |= {name: stat for name, stat in values.items() if stat is not None}
    return stats


def _next_coefficient(job: Job, settings: Ppo, kl: float) -> float:
    assert settings.kl_target is not None
    return adapted(settings.kl_coefficient, kl, settings.kl_target, job.plan.workload.samples, settings.kl_horizon)


def _critic_warms_up(job: Job, iteration: int) -> bool:
    return "critic" in job.plan.workload.graph.trainers and iteration < job.run.ppo.critic_warmup_iterations


def _minibatches(
    job: Job, found: Experience, share: Share, responses: Sequence[int]
) -> Iterator[tuple[Batch, float, MicroBatches]]:
    """This replica's part of each minibatch, the response tokens of the whole minibatch, and the micro-batches. Samples
    that do not count are not among those tokens, and in a micro-batch only where it has no other."""
    block, start = job.plan.workload.samples // job.plan.workload.minibatches, 0
    counts = found.counts or (True,) * len(responses)
    for m, (samples, cuts) in enumerate(zip(share.passes, share.micro_batches, strict=True)):
        part = found.batch.take(range(start, start + len(samples)))
        start += len(samples)
        counted = [responses[i] for i in range(m * block, (m + 1) * block) if counts[i]]
        own, most = [responses[i] if counts[i] else 0 for i in samples], job.plan.workload.response_tokens
        each = sample_weights(job.run.ppo.loss_average, counted, own, most)
        lengths = torch.tensor(part.sequences.responses, dtype=torch.int64)
        weights = torch.tensor(each).repeat_interleave(lengths).to(part.sequences.tokens.device)
        left = [[i for i in cut if counts[samples[i]]] or cut[:1] for cut in cuts]
        yield replace(part, fields={**part.fields, WEIGHTS: weights}), max(sum(counted), 1.0), left


def _balance(job: Job, call: Call, found: Experience, share: Share, minibatch: int) -> Balance | None:
    """How much the balance of experts counts in a minibatch."""
    coefficient, block = job.balance(call.model), job.plan.workload.samples // job.plan.workload.minibatches
    if not coefficient:
        return None
    if found.counts is None:
        return Balance(coefficient, block)
    counted = sum(found.counts[minibatch * block : (minibatch + 1) * block])
    return Balance(coefficient, max(counted, 1), tuple(found.counts[i] for i in share.passes[minibatch]))


def sample_weights(average: str, counted: Sequence[int], own: Sequence[int], most: int) -> list[float]:
    """What a token of each of some samples counts in the loss of a minibatch, by `ppo.loss_average`. counted: response
    tokens of the samples that count in the whole minibatch; own: of those asked for, 0 where one does not count; most:
    tokens that a response may have."""
    match average:
        case "sequence":
            return [1.0 / (len(counted) * length) if length else 0.0 for length in own]
        case "constant":
            return [1.0 / (len(counted) * most) if length else 0.0 for length in own]
    return [1.0 / sum(counted) if length else 0.0 for length in own]


def _loss(job: Job, call: Call, settings: Ppo, tokens: float) -> LossFunction:
    """The loss of a role's micro-batches; `tokens` are the response tokens of the whole minibatch."""
    workload = job.plan.workload
    pairs = workload.samples // workload.minibatches // 2
    named = loss_of(workload.graph, call)
    own = None if named in ALGORITHMS else load_function(named)

    def loss(output: TokenOutput, batch: Batch) -> Loss:
        if own is not None:
            return checked_loss(call.loss, own, output, batch, tokens)
        match named, call.model:
            case "sft", _:
                return sft_loss(output.logprobs, tokens)
            case "dpo", _:
                lengths = batch.sequences.responses
                return dpo_loss(output.logprobs, batch["ref_logprobs"], lengths, job.run.dpo.beta, pairs)
            case "reward-modelling", _:
                return pair_loss(output.scores, pairs)
            case _, "critic":
                return critic_loss(settings, tokens, output, batch)
        return actor_loss(settings, tokens, output, batch, kl_in_loss=ALGORITHMS[named].kl_in_loss)

    return loss


def checked_loss(name: str, own: Callable[..., Any], output: TokenOutput, batch: Batch, tokens: float) -> Loss:
    """What a function of the user's own says: a loss that is a sum over this micro-batch divided by a count of the
    whole minibatch, and terms to report, which add up likewise."""
    try:
        loss, terms = own(output, batch, tokens)
        found = {str(key): torch.as_tensor(value, device=loss.device) for key, value in {"loss": loss, **terms}.items()}
    except Exception as error:
        raise RealplanError(f"loss `{name}` raised {type(error).__name__}: {error}", _OWN_LOSS) from error
    if loss.dim():
        raise RealplanError(f"loss `{name}` gave a tensor of shape {tuple(loss.shape)}", _OWN_LOSS)
    return loss, found


def actor_loss(settings: Ppo, tokens: float, output: TokenOutput, batch: Batch, *, kl_in_loss: bool) -> Loss:
    """The clipped policy loss of a micro-batch, plus the KL to the reference where it is in the loss."""
    logprobs, weights = output.logprobs, batch[WEIGHTS]
    clip = Clip(settings.clip, settings.clip if settings.clip_high is None else settings.clip_high, settings.dual_clip)
    whole = batch.sequences.responses if settings.ratio == "sequence" else None
    old, advantages = batch["old_logprobs"], batch["advantages"]
    loss, terms = policy_loss(logprobs, old, advantages, clip, weights, tokens=tokens, lengths=whole)
    terms = {**terms, "entropy": (output.entropy * counted(weights)).sum() / tokens}
    if settings.entropy_coefficient:
        loss = loss - settings.entropy_coefficient * (output.entropy * weights).sum()
    kl_in = settings.kl_in or ("loss" if kl_in_loss else "reward")
    if kl_in == "loss" and settings.kl_coefficient and "ref_logprobs" in batch.fields:
        kl, kl_terms = kl_loss(logprobs, batch["ref_logprobs"], weights, settings.kl_estimator or "k3")
        return loss + settings.kl_coefficient * kl, {**terms, **kl_terms}
    return loss, terms


def critic_loss(settings: Ppo, tokens: float, output: TokenOutput, batch: Batch) -> Loss:
    """The clipped value loss of a micro-batch."""
    counts, clip = counted(batch[WEIGHTS]), settings.value_clip
    return value_loss(output.values, batch["values"], batch["returns"], clip, counts, tokens=tokens)


def _step_stats(role: str, steps: Sequence[StepStats]) -> dict[str, Stat]:
    found: dict[str, list[Stat]] = {}
    skipped = Stat.one(float(sum(bool(step.skipped) for step in steps)))
    for step in steps:
        if step.skipped:
            continue
        for name, value in {**step.terms, "grad_norm": step.grad_norm, "lr": step.lr}.items():
            found.setdefault(f"{role}/{name}", []).append(Stat.one(value))
    stats = {name: merge_stats(parts) for name, parts in found.items()}
    return stats | ({f"{role}/skipped_steps": skipped} if skipped.total else {})
