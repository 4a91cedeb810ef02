"""Training calls: one optimizer step per minibatch, with the loss of the algorithm and the role.

Rows stand in the order of `plans.batches.dp_rows`: this replica's share of minibatch 0, then of minibatch 1, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from plans.algorithms import ALGORITHMS
from plans.graph import Call
from plans.plan import PlannedCall
from runtime.algorithms.losses import Loss, kl_loss, policy_loss, value_loss
from runtime.algorithms.offline import dpo_loss, pair_loss, sft_loss
from runtime.batches.experience import Experience, experience
from runtime.batches.transfer import Rows
from runtime.job import Job
from runtime.passes.forward import Batch, LossFunction, TokenOutput
from runtime.passes.training import StepStats, Trainer
from runtime.reports.stats import Stat, merge_stats


def train_call(
    job: Job, call: Call, planned: PlannedCall, trainer: Trainer, inputs: Mapping[str, Rows], rows: Sequence[int],
    iteration: int,
) -> dict[str, Stat]:  # fmt: skip
    """Train a role for one iteration; its metrics, on the ranks that report them."""
    found = experience(job, trainer, inputs, rows)
    steps: list[StepStats] = []
    if call.model == "critic" or not _critic_warms_up(job, iteration):
        for part, tokens in _minibatches(job, found):
            parts, skip = planned.strategy.micro_batches, job.run.on_nonfinite == "skip"
            steps.append(trainer.step(part, _loss(job, call, tokens), parts, job.temperature, skip_nonfinite=skip))
    place = trainer.model.place
    stats: dict[str, Stat] = {}
    if place.tp == 0 and place.pp == 0:
        if place.dp == 0:
            stats |= _step_stats(call.model, steps)
        if call.model != "critic":
            values = {name: Stat.of(value) for name, value in found.report.items()}
            stats |= {name: stat for name, stat in values.items() if stat is not None}
    return stats


def _critic_warms_up(job: Job, iteration: int) -> bool:
    return "critic" in job.plan.workload.graph.trainers and iteration < job.run.ppo.critic_warmup_iterations


def _minibatches(job: Job, found: Experience) -> Iterator[tuple[Batch, float]]:
    """This replica's part of each minibatch, and the response tokens of the whole minibatch."""
    count = job.plan.workload.minibatches
    share, block = len(found.batch["tokens"]) // count, job.plan.workload.samples // count
    for m in range(count):
        part = {key: value[m * share : (m + 1) * share] for key, value in found.batch.items()}
        yield part, max(sum(found.tokens_of[m * block : (m + 1) * block]), 1.0)


def _loss(job: Job, call: Call, tokens: float) -> LossFunction:
    """The loss of a role's micro-batches; `tokens` are the response tokens of the whole minibatch."""
    workload = job.plan.workload
    width, pairs = workload.prompt_tokens, workload.samples // workload.minibatches // 2

    def loss(output: TokenOutput, batch: Batch) -> Loss:
        match workload.graph.name, call.model:
            case "sft", _:
                return sft_loss(output.logprobs[:, width:], batch["response"], tokens)
            case "dpo", _:
                logprobs = output.logprobs[:, width:]
                return dpo_loss(logprobs, batch["ref_logprobs"], batch["response"], job.run.dpo.beta, pairs)
            case "reward-modelling", _:
                return pair_loss(output.values.gather(1, batch["last"]).squeeze(1), pairs)
            case _, "critic":
                return critic_loss(job, tokens, output, batch)
        return actor_loss(job, tokens, output, batch)

    return loss


def actor_loss(job: Job, tokens: float, output: TokenOutput, batch: Batch) -> Loss:
    """The clipped policy loss of a micro-batch, plus the KL to the reference where the algorithm has it there."""
    settings, width = job.run.ppo, job.plan.workload.prompt_tokens
    mask, logprobs = batch["response"], output.logprobs[:, width:]
    loss, terms = policy_loss(logprobs, batch["old_logprobs"], batch["advantages"], mask, settings.clip, tokens)
    terms = {**terms, "entropy": (output.entropy[:, width:].detach() * mask).sum() / tokens}
    if ALGORITHMS[job.plan.workload.graph.name].kl_in_loss and settings.kl_coefficient:
        kl, kl_terms = kl_loss(logprobs, batch["ref_logprobs"], mask, tokens)
        return loss + settings.kl_coefficient * kl, {**terms, **kl_terms}
    return loss, terms


def critic_loss(job: Job, tokens: float, output: TokenOutput, batch: Batch) -> Loss:
    """The clipped value loss of a micro-batch; the value before a token stands one column to its left."""
    values = output.values[:, job.plan.workload.prompt_tokens - 1 : -1]
    return value_loss(values, batch["values"], batch["returns"], batch["response"], job.run.ppo.value_clip, tokens)


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
