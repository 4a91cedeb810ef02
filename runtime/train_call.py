"""Training calls: one optimizer step per minibatch, with the loss of the algorithm and the role.

Samples stand in the order of `plans.batches.Share`: this replica's part of minibatch 0, then of minibatch 1, ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from plans.algorithms import ALGORITHMS, loss_of
from plans.batches import Share
from plans.errors import RealplanError
from plans.graph import Call
from runtime.algorithms.losses import Loss, kl_loss, policy_loss, value_loss
from runtime.algorithms.offline import dpo_loss, pair_loss, sft_loss
from runtime.batches.experience import experience
from runtime.batches.reward_functions import load_function
from runtime.calls import Values
from runtime.job import Job
from runtime.passes.forward import LossFunction, MicroBatches, TokenOutput
from runtime.passes.packs import Batch
from runtime.passes.training import StepStats, Trainer
from runtime.reports.stats import Stat, merge_stats

_OWN_LOSS = "(output, batch, tokens) -> (loss, {name: term}), both sums over the micro-batch divided by `tokens`"


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
        for part, tokens, cuts in _minibatches(job, found.batch, share, responses):
            loss = _loss(job, call, tokens)
            steps.append(trainer.step(part, loss, cuts, job.temperature, skip_nonfinite=skip))
    place = trainer.model.place
    stats: dict[str, Stat] = {}
    if place.tp == place.pp == place.cp == 0:
        if place.dp == 0:
            stats |= _step_stats(call.model, steps)
        if call.model != "critic":
            values = {name: Stat.of(value) for name, value in found.report.items()}
            stats |= {name: stat for name, stat in values.items() if stat is not None}
    return stats


def _critic_warms_up(job: Job, iteration: int) -> bool:
    return "critic" in job.plan.workload.graph.trainers and iteration < job.run.ppo.critic_warmup_iterations


def _minibatches(
    job: Job, batch: Batch, share: Share, responses: Sequence[int]
) -> Iterator[tuple[Batch, float, MicroBatches]]:
    """This replica's part of each minibatch, the response tokens of the whole minibatch, and the micro-batches."""
    block, start = job.plan.workload.samples // job.plan.workload.minibatches, 0
    for m, (samples, cuts) in enumerate(zip(share.passes, share.micro_batches, strict=True)):
        part = batch.take(range(start, start + len(samples)))
        start += len(samples)
        yield part, max(sum(responses[m * block : (m + 1) * block]), 1.0), cuts


def _loss(job: Job, call: Call, tokens: float) -> LossFunction:
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
                return critic_loss(job, tokens, output, batch)
        return actor_loss(job, tokens, output, batch, kl_in_loss=ALGORITHMS[named].kl_in_loss)

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


def actor_loss(job: Job, tokens: float, output: TokenOutput, batch: Batch, *, kl_in_loss: bool) -> Loss:
    """The clipped policy loss of a micro-batch, plus the KL to the reference where the algorithm has it there."""
    settings, logprobs = job.run.ppo, output.logprobs
    loss, terms = policy_loss(logprobs, batch["old_logprobs"], batch["advantages"], settings.clip, tokens)
    terms = {**terms, "entropy": output.entropy.sum() / tokens}
    if kl_in_loss and settings.kl_coefficient and "ref_logprobs" in batch.fields:
        kl, kl_terms = kl_loss(logprobs, batch["ref_logprobs"], tokens)
        return loss + settings.kl_coefficient * kl, {**terms, **kl_terms}
    return loss, terms


def critic_loss(job: Job, tokens: float, output: TokenOutput, batch: Batch) -> Loss:
    """The clipped value loss of a micro-batch."""
    return value_loss(output.values, batch["values"], batch["returns"], job.run.ppo.value_clip, tokens)


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
