"""Forward and backward passes through Megatron's pipeline schedules: padded samples in, one number per token out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from plans.errors import RealplanError
from plans.model import Head
from runtime.models.mcore import P2PCommunicator, schedules
from runtime.models.model import Model
from runtime.passes.logprobs import token_logprobs_of

T = TypeVar("T")

Batch = Mapping[str, Tensor]
"""Tensors of n samples, each [n, ...]. Always `tokens` [n, s], a prompt padded on the left and a response padded on
the right, and `mask` [n, s], True where a token is real."""


@dataclass(frozen=True)
class TokenOutput:
    """What a model says about each token of a batch; float32 [n, s], 0 where the mask is False.

    logprobs: log-probability of the token given those before it (0 for the first); entropy: of the distribution it was
    drawn from. Both empty for a value head. values: the head's scalar after the token was read; empty for an LM head.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor

    def per_token(self) -> Tensor:
        """Log-probabilities or values, whichever the model gives."""
        return self.values if self.values.numel() else self.logprobs


LossFunction = Callable[[TokenOutput, Batch], tuple[Tensor, Mapping[str, Tensor]]]
"""Loss of one micro-batch, normalised by global token counts so that losses of all micro-batches and replicas add up,
and terms to report, which add up as well."""


@dataclass(frozen=True)
class Packed:
    """A batch whose samples start at column 0, so that causal attention needs no mask: a real token sees no padding.

    tokens: [n, width]; columns: [n, s], where each original column went; mask: [n, s].
    """

    tokens: Tensor
    columns: Tensor
    mask: Tensor

    def unpack(self, packed: Tensor) -> Tensor:
        """[n, width] in the original columns [n, s], 0 where the mask is False."""
        return packed.gather(1, self.columns).where(self.mask, 0.0)


def packed_width(mask: Tensor, multiple: int) -> int:
    """Columns that hold the longest sample of a mask [n, s], rounded up to a multiple."""
    longest = max(1, int(mask.sum(1).max()))
    return -(-longest // multiple) * multiple


def pack(tokens: Tensor, mask: Tensor, width: int) -> Packed:
    """Move the real tokens of each sample to the front. Rotary positions are relative, so this changes no result."""
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    moved = tokens.gather(1, order)[:, :width]
    if moved.shape[1] < width:
        moved = torch.nn.functional.pad(moved, (0, width - moved.shape[1]))
    return Packed(moved, (mask.cumsum(1) - 1).clamp_min(0), mask)


def cut(batch: Batch, parts: int) -> list[Batch]:
    """Equal micro-batches, in order."""
    samples = batch["tokens"].shape[0]
    if samples % parts:
        legal = [p for p in range(1, samples + 1) if samples % p == 0]
        raise RealplanError(
            f"{samples} samples do not divide into {parts} micro-batches", f"micro_batches one of {legal[:16]}"
        )
    size = samples // parts
    return [{k: v[i * size : (i + 1) * size] for k, v in batch.items()} for i in range(parts)]


def run_schedule(
    model: Model,
    modules: Sequence[Any],
    packed: Sequence[Packed],
    finish: Callable[[Tensor, int], Any],
    *,
    forward_only: bool,
) -> list[Any]:
    """Run micro-batches through the pipeline of this rank's replica; what `finish` returned, on the last stage.

    modules: the model's chunks, or their DDP wrappers. finish(output, i) gets the output of micro-batch i:
    [n, width, vocabulary / tp] logits or [n, width, 1] values. Forward only, its results are collected. Else it
    returns (loss, terms) and the terms are collected; gradients add up in the modules, unscaled.
    """

    def forward_step(batches: Iterator[tuple[int, Packed]], module: Any) -> tuple[Tensor, Callable[..., Any]]:
        index, batch = next(batches)

        def close(output: Tensor, non_loss_data: bool = False) -> Any:
            result = finish(output, index)
            if non_loss_data:
                return result
            loss, terms = result
            return loss, torch.ones((), dtype=torch.int, device=loss.device), terms

        return module(batch.tokens, None, None), close

    samples, width = packed[0].tokens.shape
    stage_data = [iter(list(enumerate(packed))) for _ in modules]
    common: dict[str, Any] = {
        "forward_step_func": forward_step,
        "num_microbatches": len(packed),
        "seq_length": width,
        "micro_batch_size": samples,
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


def pack_micro_batches(model: Model, batches: Sequence[Batch]) -> list[Packed]:
    """Pack micro-batches to one width, which the fixed shapes of the pipeline need."""
    multiple = model.layout.tp if model.config.sequence_parallel else 1
    width = max(packed_width(batch["mask"], multiple) for batch in batches)
    return [pack(batch["tokens"], batch["mask"], width) for batch in batches]


def token_output(model: Model, output: Tensor, batch: Packed, temperature: float = 1.0) -> TokenOutput:
    """Numbers per token, in the batch's own columns, from what the last stage computed for a packed micro-batch."""
    nothing = output.new_empty(0, dtype=torch.float32)
    if model.spec.head is Head.VALUE:
        return TokenOutput(nothing, nothing, batch.unpack(output.float().squeeze(-1)))
    logprobs, entropy = token_logprobs_of(
        output[:, :-1], batch.tokens[:, 1:], model.groups.tp, model.spec.vocab, temperature
    )
    shifted = [batch.unpack(torch.nn.functional.pad(x, (1, 0))) for x in (logprobs, entropy)]
    return TokenOutput(shifted[0], shifted[1], nothing)


def _per_token(model: Model, batch: Batch, micro_batches: int, temperature: float) -> Tensor:
    for chunk in model.chunks:
        chunk.eval()
    packed = pack_micro_batches(model, cut(batch, micro_batches))

    def finish(output: Tensor, index: int) -> Tensor:
        return token_output(model, output, packed[index], temperature).per_token()

    with torch.no_grad():
        parts = run_schedule(model, model.chunks, packed, finish, forward_only=True)
    result = torch.cat(parts) if model.last_stage else torch.empty(batch["tokens"].shape, device=model.device)
    return from_last_stage(model, result)


def from_last_stage(model: Model, tensor: Tensor) -> Tensor:
    """Give every stage of the pipeline the last one's tensor; on the others it is the buffer to fill."""
    if model.layout.pp > 1:
        group = model.groups.pp
        dist.broadcast(tensor, src=dist.get_global_rank(group, model.layout.pp - 1), group=group)
    return tensor


def token_logprobs(
    model: Model, tokens: Tensor, mask: Tensor, *, micro_batches: int = 1, temperature: float = 1.0
) -> Tensor:
    """Log-probability of each token given those before it: float32 [n, s] on every rank of the replica.

    tokens, mask: [n, s], this replica's samples (see `Batch`). Collective over the replica.
    """
    assert model.spec.head is Head.LM
    return _per_token(model, {"tokens": tokens, "mask": mask}, micro_batches, temperature)


def token_values(model: Model, tokens: Tensor, mask: Tensor, *, micro_batches: int = 1) -> Tensor:
    """The value head's scalar after each token: float32 [n, s] on every rank of the replica."""
    assert model.spec.head is Head.VALUE
    return _per_token(model, {"tokens": tokens, "mask": mask}, micro_batches, 1.0)
