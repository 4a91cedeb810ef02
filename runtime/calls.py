"""What generation, inference and reward calls do with a model: rows of tensors in, rows of tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from plans.algorithms import GREEDY
from plans.graph import Call
from plans.plan import PlannedCall
from runtime.algorithms.samples import response_mask
from runtime.batches.transfer import Rows
from runtime.job import Job
from runtime.models.model import Model
from runtime.passes.forward import token_logprobs, token_values
from runtime.passes.generation import generate
from runtime.passes.sampling import Sampling


def generate_call(
    job: Job, call: Call, planned: PlannedCall, model: Model, rows: Sequence[int], iteration: int
) -> dict[str, Rows]:
    """Responses to the prompts of samples `rows`, wave after wave; sample i belongs to prompt i // group_size."""
    wave = len(rows) // planned.strategy.waves
    sequences, logprobs = call.outputs
    sampling = Sampling(temperature=0) if sequences.endswith(GREEDY) else job.sampling
    parts = [
        _generate_wave(job, planned, model, sampling, rows[at : at + wave], iteration)
        for at in range(0, len(rows), wave)
    ]
    made = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return {logprobs: {logprobs: made.pop("logprobs")}, sequences: made}


def _generate_wave(
    job: Job, planned: PlannedCall, model: Model, sampling: Sampling, rows: Sequence[int], iteration: int
) -> Rows:
    assert job.prompts is not None
    workload = job.plan.workload
    prompts, lengths = job.prompts.tokens(iteration, [row // workload.group_size for row in rows])
    made = generate(
        model,
        prompts.to(model.device),
        lengths.to(model.device),
        torch.tensor(rows, device=model.device),
        response_tokens=workload.response_tokens,
        groups=planned.strategy.groups,
        sampling=sampling,
        seed=job.run.seed,
        iteration=iteration,
        stop_ids=job.stop_ids,
        pad_id=job.pad_id,
    )
    return {
        "tokens": made.tokens,
        "prompt_lengths": lengths.to(model.device),
        "response_lengths": made.lengths,
        "logprobs": made.logprobs,
    }


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


def reward_call(job: Job, call: Call, host: Model, inputs: Mapping[str, Rows]) -> dict[str, Rows]:
    """Scores of the user's function, computed by the first rank of each replica of the host call's model."""
    sequences, (key,) = inputs[call.inputs[0]], call.outputs
    count = len(sequences["tokens"])
    scores = torch.zeros(count, device=host.device)
    group = host.groups.mp
    if group.rank() == 0:
        scores.copy_(torch.tensor(_scores(job, sequences)))
    if group.size() > 1:
        dist.broadcast(scores, src=dist.get_global_rank(group, 0), group=group)
    return {key: {key: scores}}


def _scores(job: Job, sequences: Rows) -> list[float]:
    assert job.reward is not None and job.tokenizer is not None
    width = job.plan.workload.prompt_tokens
    prompts, responses = [], []
    lists = (sequences[k].tolist() for k in ("tokens", "prompt_lengths", "response_lengths"))
    for tokens, prompt, response in zip(*lists, strict=True):
        prompts.append(job.tokenizer.decode(tokens[width - prompt : width]))
        responses.append(job.tokenizer.decode(tokens[width : width + response]))
    return job.reward(prompts, responses)
