"""What generation, inference and reward calls do with a model: rows of tensors in, rows of tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from plans.algorithms import GREEDY
from plans.graph import Call
from plans.kvcache import slots_per_replica
from plans.plan import PlannedCall
from runtime.algorithms.samples import response_mask
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
        limits=Limits(slots=slots_per_replica(len(rows), waves=strategy.waves), groups=strategy.groups),
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
