"""Keys and values of a stage, and attention of single tokens on them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from plans.errors import RealplanError
from plans.kvcache import BLOCK_TOKENS
from runtime.generation.blocks import BlockCopy
from runtime.generation.lean import Attend, LeanStage
from runtime.models.packed_attention import Runs, attention, packed_attention
from runtime.routes import route_type


@cache
def paged_kernel() -> bool:
    """Whether torch's variable-length attention takes block tables (from 2.12 on)."""
    from torch.nn.attention.varlen import varlen_attn

    return {"block_table", "seqused_k", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


def suited_block(device: torch.device, dtype: torch.dtype) -> int:
    """Tokens of a KV block where attention reads blocks in place (half precision on CUDA), 0 for a slot's whole row."""
    half = dtype in (torch.bfloat16, torch.float16)
    return BLOCK_TOKENS if device.type == "cuda" and half and paged_kernel() else 0


class Pool:
    """Blocks of keys and values of every layer of a stage: [layers, blocks, block_tokens, kv_heads / tp, 2, dim].

    routes: where they are asked for, beside the keys of a token the experts that it visits, so that both are shared by
    the samples of a prompt, copied and moved alike: [layers, blocks x block_tokens + 1, experts per token]. The last
    place, `nowhere`, is for tokens that nobody reads.
    """

    def __init__(self, stage: LeanStage, blocks: int, block_tokens: int, *, routes: bool = False) -> None:
        dtype, device = stage.model.config.params_dtype, stage.model.device
        shape = (len(stage.blocks), blocks, block_tokens, stage.kv_heads, 2, stage.dim)
        count = torch.Size(shape).numel() * dtype.itemsize
        self._check(count, device)
        try:
            # Zeros, because a slot without a sample is attended to, and what it reads must be a number.
            self.data = torch.zeros(shape, dtype=dtype, device=device)
        except (RuntimeError, MemoryError):
            raise _too_large(count, "what can be allocated") from None
        self.block_tokens = block_tokens
        self.flat = [layer.flatten(0, 1) for layer in self.data]
        self.nowhere = blocks * block_tokens
        self.routes: Tensor | None = None
        if routes:
            spec = stage.model.spec
            chosen = (len(stage.blocks), self.nowhere + 1, spec.experts_per_token)
            self.routes = torch.zeros(chosen, dtype=route_type(spec), device=device)

    @staticmethod
    def _check(count: int, device: torch.device) -> None:
        if device.type == "cuda":
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = torch.cuda.mem_get_info(device)[0] + cached
            if count > free:
                raise _too_large(count, f"the {free / 2**30:.2f} GiB that are free")

    def store(self, layer: int, places: Tensor, qkv: Tensor) -> None:
        """Write keys and values of tokens [n] to flat places [n]."""
        self.flat[layer].index_copy_(0, places, qkv[:, :, -2:])

    def note(self, places: Tensor, layer: int, chosen: Tensor) -> None:
        """Write the experts [n, k] that tokens visit to flat places [n]."""
        assert self.routes is not None
        self.routes[layer].index_copy_(0, places, chosen.to(self.routes.dtype))

    def routes_at(self, places: Tensor) -> Tensor:
        """The experts of tokens at flat places [n] in every layer of the stage: [n, layers, k]."""
        assert self.routes is not None
        return self.routes.index_select(1, places).transpose(0, 1).contiguous()

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy the beginnings of blocks, one after the other."""
        for one in copies:
            self.data[:, one.target, : one.tokens].copy_(self.data[:, one.source, : one.tokens])
            if self.routes is not None:
                source, target = one.source * self.block_tokens, one.target * self.block_tokens
                kept = self.routes[:, source : source + one.tokens]
                self.routes[:, target : target + one.tokens].copy_(kept)


def _too_large(count: int, limit: str) -> RealplanError:
    return RealplanError(
        f"the KV cache of the slots needs {count / 2**30:.2f} GiB on this rank, more than {limit}",
        "fewer `slots` (or more `waves`) in the plan's generation call",
    )


def row_attention(stage: LeanStage, pool: Pool, count: int, longest: int, last: Tensor) -> Attend:
    """Attention of one token of each of the first `count` slots, whose block is the slot's own, on at most `longest`
    tokens.

    last: [n] position of the token, which is the last one that it sees.
    """
    share = stage.share
    columns = torch.arange(longest, device=last.device)
    masks = _masks(stage, columns, last, pool.data.dtype)
    places = row_places(pool, last)
    rows = pool.data[:, :count, :longest].permute(4, 0, 1, 3, 2, 5)
    views = list(zip(rows[0].unbind(0), rows[1].unbind(0), strict=True))

    def attend(layer: int, qkv: Tensor) -> Tensor:
        pool.store(layer, places, qkv)
        keys, values = views[layer]
        # Queries that share a key stand in the place of positions.
        sight = stage.sights[layer]
        out = attention(qkv[:, :, :share], keys, values, masks[sight.window], sight)
        return out.reshape(count, -1)

    return attend


def row_places(pool: Pool, last: Tensor) -> Tensor:
    """Flat places of the tokens at positions `last` [n] of the first n slots, whose blocks are their own."""
    return last + torch.arange(len(last), device=last.device) * pool.block_tokens


def _masks(stage: LeanStage, columns: Tensor, last: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
    """For each window of the stage's layers, what the token at `last` [n] sees of `columns`: [n, 1, 1, columns].

    Numbers to add, because kernels turn a mask of truths into one, layer after layer."""
    hidden = torch.full((), -torch.inf, dtype=dtype, device=last.device)
    shown = torch.zeros_like(hidden)
    found = {}
    for window in {sight.window for sight in stage.sights}:
        outside = columns > last[:, None]
        if window:
            outside |= columns <= last[:, None] - window
        found[window] = torch.where(outside, hidden, shown)[:, None, None]
    return found


def gathered_attention(stage: LeanStage, pool: Pool, tables: Tensor, last: Tensor) -> Attend:
    """Attention of one token of each of n slots on blocks that `tables` [n, m] int64 name, gathered for each layer."""
    count, share, size = len(tables), stage.share, pool.block_tokens
    columns = torch.arange(tables.shape[1] * size, device=last.device)
    masks = _masks(stage, columns, last, pool.data.dtype)
    places = table_places(tables, last, size)
    listed = tables.flatten()

    def attend(layer: int, qkv: Tensor) -> Tensor:
        pool.store(layer, places, qkv)
        blocks = pool.data[layer].index_select(0, listed)
        keys, values = blocks.view(count, -1, *blocks.shape[2:]).permute(3, 0, 2, 1, 4).unbind(0)
        sight = stage.sights[layer]
        return attention(qkv[:, :, :share], keys, values, masks[sight.window], sight).reshape(count, -1)

    return attend


def paged_attention(stage: LeanStage, pool: Pool, tables: Tensor, last: Tensor) -> Attend:
    """As `gathered_attention`, in one kernel that reads the blocks where they lie (half precision on CUDA)."""
    from torch.nn.attention.varlen import varlen_attn

    kernel: Any = varlen_attn
    count, share = len(tables), stage.share
    bounds = torch.arange(count + 1, dtype=torch.int32, device=last.device)
    used, listed = (last + 1).to(torch.int32), tables.to(torch.int32)
    longest = tables.shape[1] * pool.block_tokens
    places = table_places(tables, last, pool.block_tokens)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        pool.store(layer, places, qkv)
        keys, values = pool.data[layer].unbind(3)
        query = qkv[:, :, :share].flatten(1, 2)
        out = kernel(
            query, keys, values, bounds, None, 1, longest, seqused_k=used, block_table=listed, enable_gqa=share > 1
        )
        return torch.as_tensor(out).flatten(1)

    return attend


def table_places(tables: Tensor, last: Tensor, size: int) -> Tensor:
    """Flat places of the tokens at positions `last` [n] of slots with tables of blocks [n, m]."""
    block = torch.div(last, size, rounding_mode="floor")
    return tables.gather(1, block[:, None]).squeeze(1) * size + last.remainder(size)


def prefill_attention(stage: LeanStage, pool: Pool, places: Tensor, lengths: Sequence[int]) -> Attend:
    """Causal attention inside prompts of `lengths` that lie end to end; their keys and values go to flat `places`."""
    share, runs = stage.share, Runs.of(tuple(lengths), places.device)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        pool.store(layer, places, qkv)
        query = qkv[:, :, :share].flatten(1, 2)
        sight = stage.sights[layer]
        return packed_attention(query, qkv[:, :, share], qkv[:, :, share + 1], runs, runs, sight).flatten(1)

    return attend


def joined_attention(count: int, first: Attend, rest: Attend) -> Attend:
    """The first `count` tokens by `first`, which may look at keys and values that `rest` stores for the others."""

    def attend(layer: int, qkv: Tensor) -> Tensor:
        behind = rest(layer, qkv[count:])
        return torch.cat([first(layer, qkv[:count]), behind])

    return attend
