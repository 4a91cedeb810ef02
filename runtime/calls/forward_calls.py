"""What generation, inference and reward calls do with a model: ragged rows in, ragged rows out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from plans.algorithms import GREEDY, tensor_kind
from plans.batches import Share
from plans.graph import Call
from plans.kvcache import slots_per_replica
from plans.plan import PlannedCall
from runtime.algorithms.samples import gather_samples
from runtime.batches.reward_errors import RewardError
from runtime.batches.rewards import Scored
from runtime.generation.generate import FlightLimits, generate
from runtime.generation.sampling import Sampling
from runtime.job import Job
from runtime.models.model import Model
from runtime.passes.forward import sample_scores, token_logprobs, token_values
from runtime.routes import Routes, routes_among
from runtime.sequences import Sequences

Values = Sequences | Routes | Tensor
"""Rows of a tensor of the graph: sequences, routes, or numbers per response token or per sample, end to end."""


def generate_call(
    job: Job, call: Call, planned: PlannedCall, model: Model, rows: Sequence[int], iteration: int
) -> dict[str, Values]:
    """Responses to the prompts of samples `rows`; sample i belongs to prompt i // group_size. The lengths are those of
    all samples. Collective over the model's ranks."""
    assert job.prompts is not None
    workload, strategy = job.plan.workload, planned.strategy
    sequences, logprobs, lengths, *routes = call.outputs
    prompts = job.prompts.tokens(job.batch(iteration), job.numbers(rows))
    made = generate(
        model,
        [ids for ids, _ in prompts.texts()],
        rows,
        response_tokens=job.limits(iteration, rows),
        sampling=Sampling(temperature=0) if sequences.endswith(GREEDY) else job.sampling,
        seed=job.run.seed,
        iteration=iteration,
        stop_ids=job.stop_ids,
        ended=job.ended,
        limits=FlightLimits(
            slots=slots_per_replica(len(rows), strategy.slots, strategy.waves),
            groups=strategy.groups,
            allow_long=workload.allow_long,
        ),
        keep_routes=bool(routes),
    )
    own = torch.tensor([made.sequences.prompts, made.sequences.responses], device=model.device).t()
    index = torch.tensor(rows, device=model.device)
    every = gather_samples(own, index, workload.samples, model.groups.dp)
    found: dict[str, Values] = {lengths: every, sequences: made.sequences, logprobs: made.logprobs}
    return found if made.routes is None else found | dict.fromkeys(routes, made.routes)


def inference_call(job: Job, call: Call, share: Share, model: Model, inputs: Mapping[str, Values]) -> dict[str, Values]:
    """One forward pass: log-probabilities of response tokens, values before each of them, or the score of each sample,
    which is the value after its last token."""
    (sequences,) = (values for values in inputs.values() if isinstance(values, Sequences))
    (parts,), (key,) = share.micro_batches, call.outputs
    match tensor_kind(key):
        case "rewards":
            return {key: sample_scores(model, sequences, micro_batches=parts)}
        case "values":
            return {key: token_values(model, sequences, micro_batches=parts)}
    routes = routes_among(inputs)
    return {key: token_logprobs(model, sequences, micro_batches=parts, temperature=job.temperature, routes=routes)}


@dataclass(frozen=True)
class PendingScores:
    """A reward call under way: the rows that it scores, when it began (time.perf_counter), and the scores to come on
    the rank that asked for them, the first of the replica."""

    call: Call
    host: Model
    rows: Sequence[int]
    begun_s: float
    future: Future[Scored] | None


def begin_reward(
    job: Job, call: Call, host: Model, inputs: Mapping[str, Values], rows: Sequence[int], iteration: int
) -> PendingScores:
    """Ask for the scores of the user's function, which its processes compute beside what this rank does next."""
    begun_s = time.perf_counter()
    future = _ask(job, inputs[call.inputs[0]], rows, iteration) if host.groups.mp.rank() == 0 else None
    return PendingScores(call, host, rows, begun_s, future)


def end_reward(pending: PendingScores) -> tuple[dict[str, Values], float]:
    """The scores on every rank of the replica, and when they were there. Collective over the replica."""
    host, at_s = pending.host, time.perf_counter()
    scores = torch.zeros(len(pending.rows), device=host.device)
    if pending.future is not None:
        try:
            scored = pending.future.result()
        except RewardError as error:
            row = "" if error.sample is None else f" (row {pending.rows[error.sample]} of the batch)"
            raise RewardError(error.message + row, error.hint) from None
        scores.copy_(torch.tensor(scored.scores))
        at_s = scored.at_s
    group = host.groups.mp
    if group.size() > 1:
        dist.broadcast(scores, src=dist.get_global_rank(group, 0), group=group)
    (key,) = pending.call.outputs
    return {key: scores}, at_s


def _ask(job: Job, sequences: Values, rows: Sequence[int], iteration: int) -> Future[Scored]:
    assert job.reward is not None and job.tokenizer is not None and isinstance(sequences, Sequences)
    assert job.prompts is not None
    decoded = [[job.tokenizer.decode(ids) for ids in pair] for pair in sequences.texts()]
    numbers, batch = job.numbers(rows), job.batch(iteration)
    asked = job.prompts.asked(batch, numbers) or [prompt for prompt, _ in decoded]
    return job.reward.submit(asked, [response for _, response in decoded], job.prompts.columns(batch, numbers))
