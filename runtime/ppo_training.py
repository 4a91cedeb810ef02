"""PPO's training calls: experience from the tensors of the batch, then one optimizer step per minibatch.

Rows stand in the order of `plans.batches.dp_rows`: this replica's share of minibatch 0, then of minibatch 1, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from plans.graph import Call
from plans.plan import PlannedCall
from plans.runfile import Ppo
from runtime.calls import sequence_mask
from runtime.forward import Batch, LossFunction, TokenOutput
from runtime.job import Job
from runtime.ppo import (
    gae,
    gather_samples,
    moments,
    policy_loss,
    response_mask,
    sample_sums,
    token_rewards,
    value_loss,
    whiten,
)
from runtime.stats import Stat, merge_stats
from runtime.training import StepStats, Trainer
from runtime.transfer import Rows


@dataclass(frozen=True)
class Experience:
    """What training learns from: this replica's samples, and the response tokens of every sample of the batch.

    batch: [n, ...] tensors that the losses read. tokens_of: [samples]. rewards [n, R], scores and kl [n]: reported.
    """

    batch: Batch
    tokens_of: Sequence[float]
    rewards: Tensor
    scores: Tensor
    kl: Tensor
    sequences: Rows


def experience(job: Job, trainer: Trainer, inputs: Mapping[str, Rows], rows: Sequence[int]) -> Experience:
    """Token rewards, advantages (whitened over the whole batch) and returns. Collective over the dp group."""
    ppo, workload, model = job.run.ppo, job.plan.workload, trainer.model
    sequences = inputs["sequences"]
    mask = response_mask(sequences["response_lengths"], workload.response_tokens)
    old_key = "old_logprobs" if "old_logprobs" in inputs else "gen_logprobs"
    old, ref = inputs[old_key][old_key], inputs["ref_logprobs"]["ref_logprobs"]
    values, scores = inputs["values"]["values"], inputs["rewards"]["rewards"]
    rewards = token_rewards(scores, old, ref, mask, ppo.kl_coefficient, ppo.reward_clip)
    advantages = gae(rewards, values, mask, ppo.gamma, ppo.gae_lambda)
    returns = advantages + values * mask
    index = torch.tensor(rows, device=model.device)
    sums = gather_samples(sample_sums(advantages, mask), index, workload.samples, model.groups.dp)
    if ppo.whiten_advantages:
        advantages = whiten(advantages, mask, *moments(sums))
    batch = {
        "tokens": sequences["tokens"],
        "mask": sequence_mask(sequences, workload.prompt_tokens),
        "response": mask,
        "old_logprobs": old,
        "old_values": values,
        "advantages": advantages,
        "returns": returns,
    }
    kl = ((old - ref) * mask).sum(1) / mask.sum(1).clamp_min(1)
    return Experience(batch, sums[:, 0].tolist(), rewards, scores, kl, sequences)


def train_call(
    job: Job, call: Call, planned: PlannedCall, trainer: Trainer, inputs: Mapping[str, Rows], rows: Sequence[int],
    iteration: int,
) -> dict[str, Stat]:  # fmt: skip
    """Train a role for one iteration; its metrics, on the ranks that report them."""
    found = experience(job, trainer, inputs, rows)
    steps: list[StepStats] = []
    if call.model != "actor" or iteration >= job.run.ppo.critic_warmup_iterations:
        loss = actor_loss if call.model == "actor" else critic_loss
        for part, tokens in _minibatches(job, found):
            bound: LossFunction = partial(loss, job.run.ppo, job.plan.workload.prompt_tokens, tokens)
            steps.append(trainer.step(part, bound, planned.strategy.micro_batches, job.temperature))
    place = trainer.model.place
    stats: dict[str, Stat] = {}
    if place.tp == 0 and place.pp == 0:
        if place.dp == 0:
            stats |= _step_stats(call.model, steps)
        if call.model == "actor":
            stats |= _batch_stats(job, found)
    return stats


def _minibatches(job: Job, found: Experience) -> Iterator[tuple[Batch, float]]:
    """This replica's part of each minibatch, and the response tokens of the whole minibatch."""
    count = job.plan.workload.minibatches
    share, block = len(found.scores) // count, job.plan.workload.samples // count
    for m in range(count):
        part = {key: value[m * share : (m + 1) * share] for key, value in found.batch.items()}
        yield part, max(sum(found.tokens_of[m * block : (m + 1) * block]), 1.0)


def actor_loss(
    ppo: Ppo, prompt_tokens: int, tokens: float, output: TokenOutput, batch: Batch
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The clipped policy loss of a micro-batch; `tokens` are those of the whole minibatch."""
    mask = batch["response"]
    loss, terms = policy_loss(
        output.logprobs[:, prompt_tokens:], batch["old_logprobs"], batch["advantages"], mask, ppo.clip, tokens
    )
    entropy = (output.entropy[:, prompt_tokens:].detach() * mask).sum() / tokens
    return loss, {**terms, "entropy": entropy}


def critic_loss(
    ppo: Ppo, prompt_tokens: int, tokens: float, output: TokenOutput, batch: Batch
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The clipped value loss of a micro-batch; the value before a token stands one column to its left."""
    values = output.values[:, prompt_tokens - 1 : -1]
    return value_loss(values, batch["old_values"], batch["returns"], batch["response"], ppo.value_clip, tokens)


def _step_stats(role: str, steps: Sequence[StepStats]) -> dict[str, Stat]:
    found: dict[str, list[Stat]] = {}
    for step in steps:
        for name, value in {**step.terms, "grad_norm": step.grad_norm, "lr": step.lr}.items():
            found.setdefault(f"{role}/{name}", []).append(Stat.one(value))
    return {name: merge_stats(parts) for name, parts in found.items()}


def _batch_stats(job: Job, found: Experience) -> dict[str, Stat]:
    mask, sequences = found.batch["response"], found.sequences
    lengths = sequences["response_lengths"]
    values = {
        "critic/score": found.scores,
        "critic/rewards": found.rewards.sum(1),
        "critic/advantages": found.batch["advantages"][mask],
        "critic/returns": found.batch["returns"][mask],
        "critic/values": found.batch["old_values"][mask],
        "actor/reward_kl_penalty": found.kl,
        "response_length": lengths,
        "response_length/clip_ratio": lengths == job.plan.workload.response_tokens,
        "prompt_length": sequences["prompt_lengths"],
    }
    stats = {name: Stat.of(value) for name, value in values.items()}
    return {name: stat for name, stat in stats.items() if stat is not None}
