"""Training calls: experience from the tensors of the batch, then one optimizer step per minibatch.

Rows stand in the order of `plans.batches.dp_rows`: this replica's share of minibatch 0, then of minibatch 1, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from plans.graph import Call
from plans.plan import PlannedCall
from plans.runfile import Ppo
from runtime.algorithms.losses import Loss, kl_loss, policy_loss, value_loss
from runtime.algorithms.samples import Samples, Signal, gather_samples, response_mask
from runtime.algorithms.table import ALGORITHMS
from runtime.calls import sequence_mask
from runtime.forward import Batch, LossFunction, TokenOutput
from runtime.job import Job
from runtime.stats import Stat, merge_stats
from runtime.training import StepStats, Trainer
from runtime.transfer import Rows


@dataclass(frozen=True)
class Experience:
    """What training learns from: this replica's samples, what the algorithm made of them, and the response tokens of
    every sample of the batch, [samples]. batch: [n, ...] tensors that the losses read."""

    samples: Samples
    signal: Signal
    batch: Batch
    sequences: Rows
    tokens_of: Sequence[float]


def experience(job: Job, trainer: Trainer, inputs: Mapping[str, Rows], rows: Sequence[int]) -> Experience:
    """Advantages by the algorithm of the plan. Collective over the dp group."""
    workload, sequences = job.plan.workload, inputs["sequences"]
    samples = _samples(job, trainer, inputs, rows)
    signal = ALGORITHMS[workload.graph.name].advantages(samples, job.run.ppo)
    batch = {
        "tokens": sequences["tokens"],
        "mask": sequence_mask(sequences, workload.prompt_tokens),
        "response": samples.mask,
        "old_logprobs": samples.old_logprobs,
        "ref_logprobs": samples.ref_logprobs,
        "advantages": signal.advantages,
        "returns": signal.returns,
    }
    if samples.values is not None:
        batch["old_values"] = samples.values
    tokens_of = samples.gather(samples.mask.sum(1, keepdim=True).double()).squeeze(1).tolist()
    return Experience(samples, signal, batch, sequences, tokens_of)


def _samples(job: Job, trainer: Trainer, inputs: Mapping[str, Rows], rows: Sequence[int]) -> Samples:
    tensors = {key: values[key] for key, values in inputs.items() if key in values}
    workload, index = job.plan.workload, torch.tensor(rows, device=trainer.model.device)
    return Samples(
        rows=index,
        group_size=workload.group_size,
        mask=response_mask(inputs["sequences"]["response_lengths"], workload.response_tokens),
        old_logprobs=tensors["old_logprobs" if "old_logprobs" in tensors else "gen_logprobs"],
        ref_logprobs=tensors["ref_logprobs"],
        scores=tensors["rewards"],
        values=tensors.get("values"),
        greedy_scores=tensors.get("rewards_greedy"),
        gather=partial(gather_samples, rows=index, samples=workload.samples, group=trainer.model.groups.dp),
    )


def train_call(
    job: Job, call: Call, planned: PlannedCall, trainer: Trainer, inputs: Mapping[str, Rows], rows: Sequence[int],
    iteration: int,
) -> dict[str, Stat]:  # fmt: skip
    """Train a role for one iteration; its metrics, on the ranks that report them."""
    found = experience(job, trainer, inputs, rows)
    steps: list[StepStats] = []
    if call.model == "critic" or not _critic_warms_up(job, iteration):
        for part, tokens in _minibatches(job, found):
            steps.append(trainer.step(part, _loss(job, call, tokens), planned.strategy.micro_batches, job.temperature))
    place = trainer.model.place
    stats: dict[str, Stat] = {}
    if place.tp == 0 and place.pp == 0:
        if place.dp == 0:
            stats |= _step_stats(call.model, steps)
        if call.model == "actor":
            stats |= _batch_stats(job, found)
    return stats


def _critic_warms_up(job: Job, iteration: int) -> bool:
    return "critic" in job.plan.workload.graph.trainers and iteration < job.run.ppo.critic_warmup_iterations


def _minibatches(job: Job, found: Experience) -> Iterator[tuple[Batch, float]]:
    """This replica's part of each minibatch, and the response tokens of the whole minibatch."""
    count = job.plan.workload.minibatches
    share, block = len(found.samples.rows) // count, job.plan.workload.samples // count
    for m in range(count):
        part = {key: value[m * share : (m + 1) * share] for key, value in found.batch.items()}
        yield part, max(sum(found.tokens_of[m * block : (m + 1) * block]), 1.0)


def _loss(job: Job, call: Call, tokens: float) -> LossFunction:
    """The loss of a role's micro-batches; `tokens` are the response tokens of the whole minibatch."""
    settings, width = job.run.ppo, job.plan.workload.prompt_tokens
    if call.model == "critic":
        return partial(critic_loss, settings, width, tokens)
    kl_coefficient = settings.kl_coefficient if ALGORITHMS[job.plan.workload.graph.name].kl_in_loss else 0.0
    return partial(actor_loss, settings, width, tokens, kl_coefficient)


def actor_loss(
    settings: Ppo, prompt_tokens: int, tokens: float, kl_coefficient: float, output: TokenOutput, batch: Batch
) -> Loss:
    """The clipped policy loss of a micro-batch, plus the KL to the reference where it has a weight."""
    mask, logprobs = batch["response"], output.logprobs[:, prompt_tokens:]
    loss, terms = policy_loss(logprobs, batch["old_logprobs"], batch["advantages"], mask, settings.clip, tokens)
    entropy = (output.entropy[:, prompt_tokens:].detach() * mask).sum() / tokens
    terms = {**terms, "entropy": entropy}
    if kl_coefficient:
        kl, kl_terms = kl_loss(logprobs, batch["ref_logprobs"], mask, tokens)
        return loss + kl_coefficient * kl, {**terms, **kl_terms}
    return loss, terms


def critic_loss(settings: Ppo, prompt_tokens: int, tokens: float, output: TokenOutput, batch: Batch) -> Loss:
    """The clipped value loss of a micro-batch; the value before a token stands one column to its left."""
    values = output.values[:, prompt_tokens - 1 : -1]
    return value_loss(values, batch["old_values"], batch["returns"], batch["response"], settings.value_clip, tokens)


def _step_stats(role: str, steps: Sequence[StepStats]) -> dict[str, Stat]:
    found: dict[str, list[Stat]] = {}
    for step in steps:
        for name, value in {**step.terms, "grad_norm": step.grad_norm, "lr": step.lr}.items():
            found.setdefault(f"{role}/{name}", []).append(Stat.one(value))
    return {name: merge_stats(parts) for name, parts in found.items()}


def _batch_stats(job: Job, found: Experience) -> dict[str, Stat]:
    samples, signal, lengths = found.samples, found.signal, found.sequences["response_lengths"]
    mask = samples.mask
    values = {
        "critic/score": samples.scores,
        "critic/rewards": signal.rewards.sum(1),
        "critic/advantages": signal.advantages[mask],
        "critic/returns": signal.returns[mask],
        "actor/reward_kl_penalty": samples.kl.sum(1) / mask.sum(1).clamp_min(1),
        "response_length": lengths,
        "response_length/clip_ratio": lengths == job.plan.workload.response_tokens,
        "prompt_length": found.sequences["prompt_lengths"],
    }
    if samples.values is not None:
        values["critic/values"] = samples.values[mask]
    if samples.greedy_scores is not None:
        values["critic/score_greedy"] = samples.greedy_scores
    stats = {name: Stat.of(value) for name, value in values.items()}
    return {name: stat for name, stat in stats.items() if stat is not None}
