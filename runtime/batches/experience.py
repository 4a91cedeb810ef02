"""From the tensors of a batch to what the losses read: advantages where responses were generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from runtime.algorithms.samples import Samples, Signal, gather_samples, response_mask
from runtime.algorithms.table import ADVANTAGES
from runtime.batches.sequences import Sequences, padded, unpadded
from runtime.calls import Values
from runtime.job import Job
from runtime.passes.packs import Batch
from runtime.passes.training import Trainer


@dataclass(frozen=True)
class Experience:
    """What training learns from, this replica's samples. report: numbers whose statistics are metrics."""

    batch: Batch
    report: Mapping[str, Tensor]


def experience(job: Job, trainer: Trainer, inputs: Mapping[str, Values], rows: Sequence[int]) -> Experience:
    """What a training call's inputs teach; `rows` are the numbers of its samples. Collective over the dp group."""
    workload, model = job.plan.workload, trainer.model
    (sequences,) = (values for values in inputs.values() if isinstance(values, Sequences))
    flat = {key: values for key, values in inputs.items() if isinstance(values, Tensor)}
    fields: dict[str, Tensor] = {key: flat[key] for key in ("ref_logprobs", "values") if key in flat}
    lengths = torch.tensor(sequences.responses, device=model.device)
    report = {
        "response_length": lengths,
        "response_length/clip_ratio": lengths == workload.response_tokens,
        "prompt_length": torch.tensor(sequences.prompts),
    }
    if not job.offline:
        index = torch.tensor(rows, dtype=torch.int64, device=model.device)
        gather = partial(gather_samples, rows=index, samples=workload.samples, group=model.groups.dp)
        samples = _samples(flat, sequences, index, workload.group_size, gather)
        signal = ADVANTAGES[workload.graph.name](samples, job.run.ppo)
        fields |= {
            "old_logprobs": flat[_old(flat)],
            "advantages": unpadded(signal.advantages, sequences.responses),
            "returns": unpadded(signal.returns, sequences.responses),
        }
        report |= _report(samples, signal, job.run.ppo.reward_clip)
    return Experience(Batch(sequences, fields), report)


def _old(tensors: Mapping[str, Tensor]) -> str:
    return "old_logprobs" if "old_logprobs" in tensors else "gen_logprobs"


def _samples(
    tensors: Mapping[str, Tensor],
    sequences: Sequences,
    rows: Tensor,
    group_size: int,
    gather: Callable[[Tensor], Tensor],
) -> Samples:
    """The samples in rows of the longest response's width, in which algorithms count their steps."""
    lengths = sequences.responses
    per_token = {
        key: padded(tensors[key], lengths) for key in (_old(tensors), "ref_logprobs", "values") if key in tensors
    }
    width = per_token["ref_logprobs"].shape[1]
    return Samples(
        rows=rows,
        group_size=group_size,
        mask=response_mask(torch.tensor(lengths, dtype=torch.int64, device=rows.device), width),
        old_logprobs=per_token[_old(tensors)],
        ref_logprobs=per_token["ref_logprobs"],
        scores=tensors["rewards"],
        values=per_token.get("values"),
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
