"""From the tensors of a batch to what the losses read: advantages where responses were generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from plans.algorithms import ALGORITHMS, GREEDY, loss_of, tensor_kind
from plans.graph import Call
from plans.hyperparameters import Ppo
from runtime.algorithms.groups import first_of, spread
from runtime.algorithms.importance import importance, mismatch
from runtime.algorithms.samples import Samples, Signal, gather_samples, overlong, response_mask
from runtime.algorithms.table import ADVANTAGES
from runtime.calls.forward_calls import Values
from runtime.job import Job
from runtime.passes.packs import Batch
from runtime.passes.training import Trainer
from runtime.routes import routes_among
from runtime.sequences import Sequences, padded, unpadded


@dataclass(frozen=True)
class Experience:
    """What training learns from, this replica's samples. report: numbers whose statistics are metrics. settings: the
    run's, with the coefficients of this iteration. counts: whether each sample of the whole batch counts in the loss;
    None: all. kl: the mean KL of the whole batch's responses to the reference, where a coefficient follows it."""

    batch: Batch
    report: Mapping[str, Tensor]
    settings: Ppo
    counts: tuple[bool, ...] | None = None
    kl: float | None = None


def experience(job: Job, call: Call, trainer: Trainer, inputs: Mapping[str, Values], rows: Sequence[int]) -> Experience:
    """What a training call's inputs teach; `rows` are the numbers of its samples. Collective over the dp group.

    A loss of the user's own reads the inputs as they are, numbers per sample repeated for each of its tokens.
    """
    workload, model = job.plan.workload, trainer.model
    (sequences,) = (values for values in inputs.values() if isinstance(values, Sequences))
    flat = {key: values for key, values in inputs.items() if isinstance(values, Tensor)}
    routes = routes_among(inputs)
    loss = loss_of(workload.graph, call)
    fields: dict[str, Tensor] = {key: flat[key] for key in ("ref_logprobs", "values") if key in flat}
    lengths = torch.tensor(sequences.responses, device=model.device)
    report = {
        "response_length": lengths,
        "response_length/clip_ratio": lengths == workload.response_tokens,
        "prompt_length": torch.tensor(sequences.prompts),
    }
    found = Experience(Batch(sequences, fields, routes), report, _present(job.run.ppo, trainer))
    if loss not in ALGORITHMS:
        flat = {key: settled(job, values) if tensor_kind(key) == "rewards" else values for key, values in flat.items()}
        fields |= {k: _per_token(v, sequences) for k, v in flat.items()}
        return replace(found, batch=replace(found.batch, fields=fields))
    return found if job.offline else _with_advantages(job, loss, trainer, found, flat, rows)


def _with_advantages(
    job: Job, loss: str, trainer: Trainer, found: Experience, flat: Mapping[str, Tensor], rows: Sequence[int]
) -> Experience:
    """What generated responses teach: the advantages of an algorithm, and which samples count."""
    workload, model, sequences, settings = job.plan.workload, trainer.model, found.batch.sequences, found.settings
    index = torch.tensor(rows, dtype=torch.int64, device=model.device)
    gather = partial(gather_samples, rows=index, samples=workload.samples, group=model.groups.dp)
    samples, failed = _samples(job, flat, sequences, index, gather)
    signal = ADVANTAGES[loss](overlong(samples, settings, workload.response_tokens), settings)
    counts, report = _counts(job, samples), {**found.report, **_report(samples, signal, settings.reward_clip)}
    if counts is not None:
        report["actor/dropped_samples"] = torch.tensor([not counts[row] for row in rows])
    if job.run.reward_limits.on_failure != "stop":
        report["critic/score/failed"] = failed
    advantages = unpadded(signal.advantages, sequences.responses)
    if {"old_logprobs", "gen_logprobs"} <= flat.keys():
        old, drawn = flat["old_logprobs"], flat["gen_logprobs"]
        report |= mismatch(old, drawn, settings.importance_cap)
        if settings.importance_cap is not None:
            advantages = advantages * importance(old, drawn, sequences.responses, settings)
    if settings.kl_target is not None:
        report["actor/kl_coefficient"] = torch.tensor([settings.kl_coefficient])
        report["actor/response_kl"] = _kl(samples)
    returns = unpadded(signal.returns, sequences.responses)
    fields = {**found.batch.fields, "old_logprobs": flat[_old(flat)], "advantages": advantages, "returns": returns}
    kl = None if settings.kl_target is None else _mean_kl(samples)
    return replace(found, batch=replace(found.batch, fields=fields), report=report, counts=counts, kl=kl)


def _present(settings: Ppo, trainer: Trainer) -> Ppo:
    """The settings of an iteration: a coefficient that follows the KL is that of the role's training."""
    if settings.kl_target is None or trainer.kl_coefficient is None:
        return settings
    return settings.model_copy(update={"kl_coefficient": trainer.kl_coefficient})


def _kl(samples: Samples) -> Tensor:
    """log p - log p_ref of the responses that are kept, whose mean is the KL of whole responses: float64 [kept]."""
    return samples.kl.double().sum(1)[samples.kept]


def _mean_kl(samples: Samples) -> float:
    """The mean KL of the whole batch's responses, the same on every rank of every role."""
    own = torch.stack([samples.kl.double().sum(1), samples.kept.double()], 1)
    total, count = samples.gather(own).sum(0).tolist()
    return float(total / max(count, 1.0))


def _per_token(values: Tensor, sequences: Sequences) -> Tensor:
    """Numbers per response token as they are, numbers per sample for each of its tokens."""
    tokens = sum(sequences.responses)
    if len(values) == tokens and len(sequences) != tokens:
        return values
    return values.repeat_interleave(torch.tensor(sequences.responses, device=values.device))


def _rewards(tensors: Mapping[str, Tensor]) -> Tensor:
    """The sum of what scores the samples: every input whose name begins with `rewards`, but for greedy responses."""
    return torch.stack([v for k, v in tensors.items() if k.startswith("rewards") and not k.endswith(GREEDY)]).sum(0)


def _old(tensors: Mapping[str, Tensor]) -> str:
    return "old_logprobs" if "old_logprobs" in tensors else "gen_logprobs"


def settled(job: Job, scores: Tensor) -> Tensor:
    """Scores with 0 where a reward failed and the run file does not stop for it; a model's own nan stays and does."""
    return scores if job.run.reward_limits.on_failure == "stop" else scores.nan_to_num(nan=0.0)


def _counts(job: Job, samples: Samples) -> tuple[bool, ...] | None:
    """Whether each sample of the whole batch counts in the loss; None: all do, whatever they are. Collective."""
    found, settings, workload = list[Tensor](), job.run.ppo, job.plan.workload
    if (settings.drop_flat_groups or settings.train_prompts) and samples.group_size > 1:
        found.append(spread(samples))
    if job.run.reward_limits.on_failure == "drop":
        found.append(samples.gather(samples.kept.double()[:, None]).squeeze(1) > 0)
    if not found:
        return None
    counts = torch.stack(found).all(0)
    if settings.train_prompts:
        counts = first_of(counts, samples.group_size, workload.minibatches, settings.train_prompts)
    return tuple(counts.tolist())


def _samples(
    job: Job,
    tensors: Mapping[str, Tensor],
    sequences: Sequences,
    rows: Tensor,
    gather: Callable[[Tensor], Tensor],
) -> tuple[Samples, Tensor]:
    """The samples in rows of the longest response's width, in which algorithms count their steps; and which of them
    have a reward that failed, bool [n]."""
    lengths = sequences.responses
    scores, greedy = _rewards(tensors), tensors.get("rewards_greedy")
    failed = scores.isnan() if greedy is None else scores.isnan() | greedy.isnan()
    drops = job.run.reward_limits.on_failure == "drop"
    kept = ~failed if drops else torch.ones_like(failed)
    per_token = {
        key: padded(tensors[key], lengths) for key in (_old(tensors), "ref_logprobs", "values") if key in tensors
    }
    old = per_token[_old(tensors)]
    width = old.shape[1]
    mask = response_mask(torch.tensor(lengths, dtype=torch.int64, device=rows.device), width)
    found = Samples(
        rows=rows,
        group_size=job.plan.workload.group_size,
        mask=mask & kept[:, None],
        old_logprobs=old,
        ref_logprobs=per_token.get("ref_logprobs", old),
        scores=settled(job, scores),
        kept=kept,
        values=per_token.get("values"),
        greedy_scores=None if greedy is None else settled(job, greedy),
        gather=gather,
    )
    return found, failed


def _report(samples: Samples, signal: Signal, reward_clip: float | None) -> dict[str, Tensor]:
    """Statistics under verl's names; of scores also the share that the clip changes."""
    mask, kept = samples.mask, samples.kept
    report = {
        "critic/score": samples.scores[kept],
        "critic/rewards": signal.rewards.sum(1)[kept],
        "critic/advantages": signal.advantages[mask],
        "critic/returns": signal.returns[mask],
        "actor/reward_kl_penalty": (samples.kl.sum(1) / mask.sum(1).clamp_min(1))[kept],
    }
    if samples.values is not None:
        report["critic/values"] = samples.values[mask]
    if samples.greedy_scores is not None:
        report["critic/score_greedy"] = samples.greedy_scores[kept]
    if reward_clip is not None:
        report["critic/score/clip_ratio"] = samples.scores[kept].abs() > reward_clip
    return report
