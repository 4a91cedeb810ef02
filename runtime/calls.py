"""What generation, inference and reward calls do with a model: rows of tensors in, rows of tensors out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from plans.algorithms import GREEDY
from plans.graph import Call
from plans.kvcache import slots_per_replica
from plans.plan import PlannedCall
from runtime.algorithms.samples import response_mask
from runtime.batches.reward_functions import RewardError
from runtime.batches.rewards import Scored
from runtime.batches.sequences import padded
from runtime.batches.transfer import Rows
from runtime.generation.generate import Limits, generate
from runtime.generation.sampling import Sampling
from runtime.job import Job
from runtime.models.model import Model
from runtime.passes.forward import token_logprobs, token_values


def generate_call(
    job: Job, call: Call, planned: PlannedCall, model: Model, rows: Sequence[int], iteration: int
) -> dict[str, Rows]:
    """Responses to the prompts of samples `rows`; sample i belongs to prompt i // group_size."""
    assert job.prompts is not None
    workload, strategy = job.plan.workload, planned.strategy
    sequences, logprobs = call.outputs
    sampling = Sampling(temperature=0) if sequences.endswith(GREEDY) else job.sampling
    prompts, lengths = job.prompts.tokens(iteration, [row // workload.group_size for row in rows])
    width = prompts.shape[1]
    made = generate(
        model,
        [ids[width - length :] for ids, length in zip(prompts.tolist(), lengths.tolist(), strict=True)],
        rows,
        response_tokens=workload.response_tokens,
        sampling=sampling,
        seed=job.run.seed,
        iteration=iteration,
        stop_ids=job.stop_ids,
        ended=job.ended,
        limits=Limits(slots=slots_per_replica(len(rows), strategy.slots, strategy.waves), groups=strategy.groups),
    )
    responses = made.sequences.responses
    after = prompts.new_full((len(rows), workload.response_tokens), job.pad_id)
    for row, (_, ids) in enumerate(made.sequences.texts()):
        after[row, : len(ids)] = torch.tensor(ids)
    found = padded(made.logprobs, responses)
    values = {
        "tokens": torch.cat([prompts, after], dim=1).to(model.device),
        "prompt_lengths": lengths.to(model.device),
        "response_lengths": torch.tensor(responses, device=model.device),
    }
    return {logprobs: {logprobs: F.pad(found, (0, after.shape[1] - found.shape[1]))}, sequences: values}


def sequence_mask(sequences: Rows, prompt_tokens: int) -> Tensor:
    """Mask [n, P + R] of real tokens: the end of the prompt's columns, the start of the response's."""
    tokens, prompts, responses = (sequences[k] for k in ("tokens", "prompt_lengths", "response_lengths"))
    prompt = torch.arange(prompt_tokens, device=tokens.device) >= prompt_tokens - prompts[:, None]
    return torch.cat([prompt, response_mask(responses, tokens.shape[1] - prompt_tokens)], dim=1)


def inference_call(
    job: Job, call: Call, planned: PlannedCall, model: Model, inputs: Mapping[str, Rows]
) -> dict[str, Rows]:
    """One forward pass: log-probabilities or values of response tokens, or the score of each sample.

    values[:, t] is the prediction before response token t; the score is the value after the last token.
    """
    sequences, width = inputs[call.inputs[0]], job.plan.workload.prompt_tokens
    tokens, mask = sequences["tokens"], sequence_mask(sequences, width)
    parts, (key,) = planned.strategy.micro_batches, call.outputs
    if key.removesuffix(GREEDY) == "rewards":
        last = (width + sequences["response_lengths"] - 1)[:, None]
        return {key: {key: token_values(model, tokens, mask, micro_batches=parts).gather(1, last).squeeze(1)}}
    if key == "values":
        return {key: {key: token_values(model, tokens, mask, micro_batches=parts)[:, width - 1 : -1]}}
    logprobs = token_logprobs(model, tokens, mask, micro_batches=parts, temperature=job.temperature)
    return {key: {key: logprobs[:, width:]}}


@dataclass(frozen=True)
class PendingScores:
    """A reward call under way: the rows that it scores, when it began (time.perf_counter), and the scores to come on
    the rank that asked for them, the first of the replica."""

    call: Call
    host: Model
    rows: Sequence[int]
    begun_s: float
    future: Future[Scored] | None


def begin_reward(job: Job, call: Call, host: Model, inputs: Mapping[str, Rows], rows: Sequence[int]) -> PendingScores:
    """Ask for the scores of the user's function, which its processes compute beside what this rank does next."""
    begun_s = time.perf_counter()
    future = _ask(job, inputs[call.inputs[0]]) if host.groups.mp.rank() == 0 else None
    return PendingScores(call, host, rows, begun_s, future)


def end_reward(pending: PendingScores) -> tuple[dict[str, Rows], float]:
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
    return {key: {key: scores}}, at_s


def _ask(job: Job, sequences: Rows) -> Future[Scored]:
    assert job.reward is not None and job.tokenizer is not None
    width = job.plan.workload.prompt_tokens
    prompts, responses = [], []
    lists = (sequences[k].tolist() for k in ("tokens", "prompt_lengths", "response_lengths"))
    for tokens, prompt, response in zip(*lists, strict=True):
        prompts.append(job.tokenizer.decode(tokens[width - prompt : width]))
        responses.append(job.tokenizer.decode(tokens[width : width + response]))
    return job.reward.submit(prompts, responses)
