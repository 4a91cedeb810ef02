"""From the tensors of a batch to what the losses read: advantages for what was generated, masks for given responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from runtime.algorithms.samples import Samples, Signal, gather_samples, response_mask
from runtime.algorithms.table import ADVANTAGES
from runtime.batches.transfer import Rows
from runtime.calls import sequence_mask
from runtime.job import Job
from runtime.passes.forward import Batch
from runtime.passes.training import Trainer


@dataclass(frozen=True)
class Experience:
    """What training learns from, this replica's samples.

    batch: [n, ...] tensors that the losses read. tokens_of: response tokens of every sample of the batch. report:
    numbers whose statistics are metrics.
    """

    batch: Batch
    tokens_of: Sequence[float]
    report: Mapping[str, Tensor]


def experience(job: Job, trainer: Trainer, inputs: Mapping[str, Rows], rows: Sequence[int]) -> Experience:
    """What a training call's inputs teach. Collective over the dp group."""
    workload, model = job.plan.workload, trainer.model
    index = torch.tensor(rows, device=model.device)
    gather = partial(gather_samples, rows=index, samples=workload.samples, group=model.groups.dp)
    sequences = next(values for values in inputs.values() if "response_lengths" in values)
    tensors = {key: values[key] for key, values in inputs.items() if key in values}
    lengths = sequences["response_lengths"]
    mask = response_mask(lengths, workload.response_tokens)
    batch = {
        "tokens": sequences["tokens"],
        "mask": sequence_mask(sequences, workload.prompt_tokens),
        "response": mask,
        "last": (workload.prompt_tokens + lengths - 1)[:, None],
    }
    batch |= {key: tensors[key] for key in ("ref_logprobs", "values") if key in tensors}
    report = {
        "response_length": lengths,
        "response_length/clip_ratio": lengths == workload.response_tokens,
        "prompt_length": sequences["prompt_lengths"],
    }
    if not job.offline:
        samples = _samples(tensors, index, workload.group_size, mask, gather)
        signal = ADVANTAGES[workload.graph.name](samples, job.run.ppo)
        batch |= {"old_logprobs": samples.old_logprobs, "advantages": signal.advantages, "returns": signal.returns}
        report |= _report(samples, signal, job.run.ppo.reward_clip)
    tokens_of = gather(mask.sum(1, keepdim=True).double()).squeeze(1).tolist()
    return Experience(batch, tokens_of, report)


def _samples(tensors: Rows, rows: Tensor, group_size: int, mask: Tensor, gather: Callable[[Tensor], Tensor]) -> Samples:
    return Samples(
        rows=rows,
        group_size=group_size,
        mask=mask,
        old_logprobs=tensors["old_logprobs" if "old_logprobs" in tensors else "gen_logprobs"],
        ref_logprobs=tensors["ref_logprobs"],
        scores=tensors["rewards"],
        values=tensors.get("values"),
        greedy_scores=tensors.get("rewards_greedy"),
        gather=gather,
    )


def _report(samples: Samples, signal: Signal, reward_clip: float | None) -> dict[str, Tensor]:
    """Statistics under verl's names; of scores also the share that the clip changes."""
    mask = samples.mask
    report = {
        "critic/score": samples.scores,
        "critic/rewards": signal.rewards.sum(1),
        "critic/advantages": signal.advantages[mask],
        "critic/returns": signal.returns[mask],
        "actor/reward_kl_penalty": samples.kl.sum(1) / mask.sum(1).clamp_min(1),
    }
    if samples.values is not None:
        report["critic/values"] = samples.values[mask]
    if samples.greedy_scores is not None:
        report["critic/score_greedy"] = samples.greedy_scores
    if reward_clip is not None:
        report["critic/score/clip_ratio"] = samples.scores.abs() > reward_clip
    return report
