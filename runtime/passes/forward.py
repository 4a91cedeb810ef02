"""Forward and backward passes through Megatron's pipeline schedules: packs in, numbers per response token out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plans.model import Head
from runtime.models.mcore import (
    DistributedDataParallel,
    P2PCommunicator,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    schedules,
)
from runtime.models.model import Model
from runtime.passes.logprobs import token_logprobs_of
from runtime.passes.packs import Batch, Pack, packs_of, replayed
from runtime.routes import Routes
from runtime.sequences import Sequences, take_runs

MicroBatches = Sequence[Sequence[int]]
"""Samples of each micro-batch of a pass (`plans.batches.micro_batches`). An empty one computes on a token that no loss
reads, to keep step with other ranks."""


@dataclass(frozen=True)
class TokenOutput:
    """What a model says about the sequences of a micro-batch; float32.

    logprobs: log-probability of each response token given those before it, [response tokens]; entropy: of the
    distribution it was drawn from. Both empty for a value head. values: the head's scalar before each response token
    was read; scores: its scalar after the last token, [samples]. Both empty for an LM head.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor
    scores: Tensor


LossFunction = Callable[[TokenOutput, Batch], tuple[Tensor, Mapping[str, Tensor]]]
"""Loss of one micro-batch, normalised by global token counts so that losses of all micro-batches and replicas add up,
and terms to report, which add up as well."""


def run_schedule(
    model: Model,
    modules: Sequence[Any],
    packs: Sequence[Pack],
    finish: Callable[[Tensor, int], Any],
    *,
    forward_only: bool,
) -> list[Any]:
    """Run packs through the pipeline of this rank's replica; what `finish` returned, on the last stage.

    modules: the model's chunks, or their DDP wrappers. finish(hidden, i) gets what the last stage computed for pack i
    (`token_output`). Forward only, its results are collected. Else it returns (loss, terms) and the terms are
    collected; gradients add up in the modules, unscaled.
    """
    stage_data = [iter(list(enumerate(packs))) for _ in modules]
    common: dict[str, Any] = {
        "forward_step_func": _forward_step(finish),
        "num_microbatches": len(packs),
        "seq_length": len(packs[0].tokens) * model.layout.cp,
        "micro_batch_size": 1,
        "forward_only": forward_only,
        "collect_non_loss_data": forward_only,
        "pg_collection": model.groups,
    }
    if model.layout.pp == 1:
        run = schedules.forward_backward_no_pipelining
        return list(run(data_iterator=stage_data[0], model=modules[0], **common))
    common["p2p_communicator"] = P2PCommunicator(pp_group=model.groups.pp, config=model.config)
    if len(modules) > 1:
        run = schedules.forward_backward_pipelining_with_interleaving
        return list(run(data_iterator=stage_data, model=list(modules), **common))
    run = schedules.forward_backward_pipelining_without_interleaving
    return list(run(data_iterator=stage_data[0], model=modules[0], **common))


def _forward_step(finish: Callable[[Tensor, int], Any]) -> Callable[..., tuple[Tensor, Callable[..., Any]]]:
    """What Megatron's schedules call for each pack: one chunk's hidden states, and what makes of them a result."""

    def forward_step(stage: Iterator[tuple[int, Pack]], module: Any) -> tuple[Tensor, Callable[..., Any]]:
        index, pack = next(stage)

        def close(hidden: Tensor, non_loss_data: bool = False) -> Any:
            result = finish(hidden, index)
            if non_loss_data:
                return result
            loss, terms = result
            return loss, torch.ones((), dtype=torch.int, device=loss.device), terms

        return hidden_states(module, pack), close

    return forward_step


def hidden_states(module: Any, pack: Pack) -> Tensor:
    """Hidden states [width / cp, 1, hidden] behind one chunk of the model; its norm included where it is the last.

    Embedding and blocks are called apart, because Megatron's forward would apply the head to every token.
    """
    chunk = module.module if isinstance(module, DistributedDataParallel) else module
    hidden = chunk.embedding(input_ids=pack.tokens[None], position_ids=None) if chunk.pre_process else None
    longest = max(pack.sequences.lengths, default=1)
    rotation = chunk.rotary_pos_emb.rotation(pack.positions, longest, chunk.config.params_dtype)
    out = chunk.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotation, packed_seq_params=pack.runs)
    return torch.as_tensor(out)


def token_output(model: Model, hidden: Tensor, pack: Pack, temperature: float = 1.0) -> TokenOutput:
    """What the head says of a pack, from the hidden states behind the last chunk.

    Under context parallelism a rank applies the head to the tokens that it has, and all ranks get the numbers of all.
    Each then computes the whole loss, of which its own numbers carry the gradient: the sum over cp is the gradient.
    """
    nothing = hidden.new_empty(0, dtype=torch.float32)
    head, tp, cp = model.chunks[-1], model.groups.tp, model.groups.cp
    if model.spec.head is Head.VALUE:
        values = head.output_layer(hidden)[0].flatten()
        before, last = (_from_all(values, pack, places, cp) for places in (pack.before, pack.sequences.last))
        return TokenOutput(nothing, nothing, before, last)
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tp)
    numbers, places = pack.held(pack.before)
    rows = hidden.squeeze(1)[places]
    if model.layout.tp > 1 and not model.config.sequence_parallel:
        rows = copy_to_tensor_model_parallel_region(rows, group=tp)
    tied = model.spec.tied_embeddings
    weight = head.shared_embedding_or_output_weight() if tied else head.output_layer.weight
    targets = pack.sequences.tokens[pack.sequences.of_response][numbers]
    spec = model.spec
    found = token_logprobs_of(rows, weight, targets, tp, spec.vocab, temperature, cap=spec.logit_cap)
    logprobs, entropy = (_spread(part, numbers, len(pack.before), cp) for part in found)
    return TokenOutput(logprobs, entropy, nothing, nothing)


def _from_all(values: Tensor, pack: Pack, places: Tensor, cp: Any) -> Tensor:
    """Numbers at places of a pack, from those of this rank's tokens."""
    numbers, here = pack.held(places)
    return _spread(values[here], numbers, len(places), cp)


def _spread(own: Tensor, numbers: Tensor, count: int, cp: Any) -> Tensor:
    """`count` numbers on every rank of a cp group, each from the rank that has it: `own` are those of `numbers`."""
    if cp.size() == 1:
        return own
    some = own.new_zeros(count).index_copy(0, numbers, own)
    return torch.as_tensor(reduce_from_tensor_model_parallel_region(some, group=cp))


def _scored(
    model: Model,
    sequences: Sequences,
    micro_batches: MicroBatches | None,
    lengths: Sequence[int],
    pick: Callable[[Tensor, Pack], Tensor],
    routes: Routes | None = None,
) -> Tensor:
    """Numbers that the last stage picks of each pack, a run of `lengths` per sample, in the order of `sequences`."""
    parts = micro_batches or [range(len(sequences))]
    packs = packs_of(model, [sequences.take(part) for part in parts])
    if routes is not None:
        packs = [replayed(pack, routes.take(part), model) for pack, part in zip(packs, parts, strict=True)]
    for chunk in model.chunks:
        chunk.eval()
    with torch.no_grad():
        found = run_schedule(model, model.chunks, packs, lambda out, i: pick(out, packs[i]), forward_only=True)
    if not model.last_stage:
        return _from_last_stage(model, torch.empty(sum(lengths), device=model.device))
    order = [sample for part in parts for sample in part]
    places = sorted(range(len(order)), key=order.__getitem__)
    return _from_last_stage(model, take_runs(torch.cat(found), [lengths[sample] for sample in order], places))


def _from_last_stage(model: Model, tensor: Tensor) -> Tensor:
    """Give every stage of the pipeline the last one's tensor; on the others it is the buffer to fill."""
    if model.layout.pp > 1:
        group = model.groups.pp
        dist.broadcast(tensor, src=dist.get_global_rank(group, model.layout.pp - 1), group=group)
    return tensor


def token_logprobs(
    model: Model,
    sequences: Sequences,
    *,
    micro_batches: MicroBatches | None = None,
    temperature: float = 1.0,
    routes: Routes | None = None,
) -> Tensor:
    """Log-probability of each response token given those before it: float32 [response tokens] on every rank of the
    replica, whose samples `sequences` are. Collective over the replica; without `micro_batches`, in one. routes: the
    experts that the tokens have to visit."""
    assert model.spec.head is Head.LM

    def pick(hidden: Tensor, pack: Pack) -> Tensor:
        return token_output(model, hidden, pack, temperature).logprobs

    return _scored(model, sequences, micro_batches, sequences.responses, pick, routes)


def token_values(model: Model, sequences: Sequences, *, micro_batches: MicroBatches | None = None) -> Tensor:
    """The value head's scalar before each response token is read: float32 [response tokens], as `token_logprobs`."""
    assert model.spec.head is Head.VALUE
    return _scored(
        model, sequences, micro_batches, sequences.responses, lambda out, pack: token_output(model, out, pack).values
    )


def sample_scores(model: Model, sequences: Sequences, *, micro_batches: MicroBatches | None = None) -> Tensor:
    """The value head's scalar after the last token of each sample: float32 [samples], as `token_logprobs`."""
    assert model.spec.head is Head.VALUE
    ones = [1] * len(sequences)
    return _scored(model, sequences, micro_batches, ones, lambda out, pack: token_output(model, out, pack).scores)
