"""Attention inside sequences that lie end to end."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from plans.model import ModelSpec


@dataclass(frozen=True, eq=False)
class RoutedTokens:
    """What routers should know of a rank's tokens of a pack, to balance experts in each of its n sequences.

    owners: the number of each token's sequence, n for filling: int64 [width / cp]. lengths: tokens of each sequence in
    the whole pack, infinite for the filling and for what does not count: float32 [n + 1]. weight: of the loss of one
    layer and sequence.
    """

    owners: Tensor
    lengths: Tensor
    weight: float


@dataclass(frozen=True, eq=False)
class ReplayedTokens:
    """The experts that a rank's tokens of a pack have to visit. experts: what `runtime.routes` stores, in the layers of
    this rank's stage [width / cp, layers, k]; layers: the number of each, as Megatron counts, from 1. known: whether a
    token has a route; those without go where their router says: bool [width / cp]."""

    experts: Tensor
    layers: tuple[int, ...]
    known: Tensor


@dataclass(frozen=True, eq=False)
class Runs:
    """Lengths of sequences that lie end to end, in host memory, and where they begin, on the device: int32 [n + 1].

    Megatron's layers hand it to the attention core in the place of `PackedSeqParams`. routed: where experts are to be
    balanced; replayed: where tokens visit given ones.
    """

    lengths: tuple[int, ...]
    bounds: Tensor
    routed: RoutedTokens | None = None
    replayed: ReplayedTokens | None = None
    qkv_format: ClassVar[str] = "thd"

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> Runs:
        """From the lengths."""
        return cls(lengths, torch.tensor((0, *accumulate(lengths)), dtype=torch.int32, device=device))


@dataclass(frozen=True)
class Sight:
    """How the queries of a layer see keys. scale: of the scores, None for 1 / sqrt(dim). window: the last tokens that a
    query sees, its own included; 0: all before it. cap: scores become cap x tanh(score / cap); 0: they stay."""

    scale: float | None = None
    window: int = 0
    cap: float = 0.0

    @classmethod
    def of(cls, spec: ModelSpec, layer: int) -> Sight:
        """That of a layer, from 0."""
        scale = spec.query_scalar**-0.5 if spec.query_scalar else None
        return cls(scale, spec.window_of(layer), spec.attention_cap)


PLAIN = Sight()


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, of_queries: Runs, of_keys: Runs, sight: Sight = PLAIN
) -> Tensor:
    """Causal attention inside each of n sequences: [tokens, heads, dim] queries on [tokens, kv_heads, dim] keys.

    The last query of a sequence sees all of its keys, so that fewer queries than keys are its last ones. Half
    precision on CUDA takes one variable-length kernel, unless scores are capped; elsewhere sequences are attended to
    one after the other.
    """
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not sight.cap:
        return _varlen(query, key, value, of_queries, of_keys, sight)
    if of_queries.lengths == of_keys.lengths and len(set(of_keys.lengths)) == 1:
        sequences = len(of_keys.lengths)
        q, k, v = (x.reshape(sequences, -1, *x.shape[1:]) for x in (query, key, value))
        return _causal(q, k, v, sight)
    queries = torch.split(query, list(of_queries.lengths))
    keys, values = (torch.split(x, list(of_keys.lengths)) for x in (key, value))
    return torch.cat([_causal(q[None], k[None], v[None], sight) for q, k, v in zip(queries, keys, values, strict=True)])


def _causal(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
    """Attention of [b, s, heads, dim] queries as [b x s, heads, dim]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    new, known = query.shape[2], key.shape[2]
    mask = None
    if 0 < sight.window < known or 1 < new < known or (sight.cap and new > 1):
        mask = torch.ones(new, known, dtype=torch.bool, device=query.device).tril(known - new)
        if sight.window:
            mask = mask.triu(known - new - sight.window + 1)
    return attention(query, key, value, mask, sight, causal=mask is None and new > 1).transpose(1, 2).flatten(0, 1)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sight: Sight, *, causal: bool = False
) -> Tensor:
    """[b, heads, s, dim] queries on [b, kv_heads, t, dim] keys. mask: what is seen, or numbers to add to scores."""
    shared = query.shape[1] != key.shape[1]
    if not sight.cap:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=sight.scale, enable_gqa=shared
        )
    assert not causal
    if shared:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (sight.scale or query.shape[-1] ** -0.5)
    scores = sight.cap * torch.tanh(scores / sight.cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def _varlen(q: Tensor, k: Tensor, v: Tensor, of_queries: Runs, of_keys: Runs, sight: Sight) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    named: dict[str, Any] = {"scale": sight.scale, "window_size": (sight.window - 1 if sight.window else -1, 0)}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in _varlen_options():
            named["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    longest_query, longest_key = max(of_queries.lengths), max(of_keys.lengths)
    out: Any = varlen_attn(q, k, v, of_queries.bounds, of_keys.bounds, longest_query, longest_key, **named)
    return torch.as_tensor(out)


@cache
def _varlen_options() -> frozenset[str]:
    """Parameters of the variable-length kernel: keys that queries share are one from torch 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)
