"""Our two calls of torch's variable-length attention, against its signature in torch 2.11 and in the installed one.

The kernel needs a GPU: a stand-in with either signature computes what torch documents, so that a call which would not
bind, or would mean something else, fails here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from runtime.generation.attention import Pool, gathered_attention, paged_attention, paged_kernel
from runtime.models import packed_attention as module
from runtime.models.packed_attention import Runs, Sight, packed_attention

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM = 4, 2, 8


def in_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Any:
    """The signature of `varlen_attn` in torch 2.11.0."""


SIGNATURES = {"2.11": inspect.signature(in_2_11), "installed": inspect.signature(varlen.varlen_attn)}


@pytest.fixture(params=sorted(SIGNATURES))
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The stand-in, under one of the signatures."""
    monkeypatch.setattr(varlen, "varlen_attn", stand_in(SIGNATURES[request.param]))
    module._varlen_options.cache_clear()
    paged_kernel.cache_clear()
    yield request.param
    module._varlen_options.cache_clear()
    paged_kernel.cache_clear()


def stand_in(signature: inspect.Signature) -> Callable[..., Tensor]:
    """A kernel that takes only what the signature has, and what torch says of it."""

    def attend(*given: Any, **named: Any) -> Tensor:
        bound = signature.bind(*given, **named)
        bound.apply_defaults()
        words = bound.arguments
        queries, keys, values, starts = (words[name] for name in ("query", "key", "value", "cu_seq_q"))
        assert starts.dtype == torch.int32 and int(starts.diff().max()) == words["max_q"]
        sequences = []
        for i, (first, end) in enumerate(zip(starts.tolist(), starts.tolist()[1:], strict=False)):
            if words.get("block_table") is None:
                begin, stop = words["cu_seq_k"][i : i + 2].tolist()
                mine, theirs = keys[begin:stop], values[begin:stop]
            else:
                blocks, used = words["block_table"][i], words["seqused_k"][i]
                assert blocks.dtype == used.dtype == torch.int32 and words["cu_seq_k"] is None
                mine, theirs = (x[blocks].flatten(0, 1)[:used] for x in (keys, values))
            assert len(mine) <= words["max_k"]
            sequences.append(one(queries[first:end], mine, theirs, words))
        return torch.cat(sequences)

    attend.__signature__ = signature  # type: ignore[attr-defined]
    return attend


def one(query: Tensor, key: Tensor, value: Tensor, words: dict[str, Any]) -> Tensor:
    """Plain attention of a sequence: the last query and the last key are at the same position."""
    if query.shape[1] != key.shape[1]:
        assert words.get("enable_gqa"), "heads differ"
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (words["scale"] or query.shape[2] ** -0.5)
    ahead = torch.arange(len(key)) - torch.arange(len(query))[:, None] - (len(key) - len(query))
    left, right = words["window_size"]
    hidden = (ahead > right) & (right >= 0) | (ahead < -left) & (left >= 0)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("sight", [Sight(), Sight(window=3), Sight(scale=0.5)], ids=["plain", "window", "scale"])
@pytest.mark.parametrize("kv_heads", [HEADS, KV_HEADS])
def test_packed_attention_binds(kernel: str, sight: Sight, kv_heads: int) -> None:
    lengths, behind = (5, 1, 7), (2, 1, 4)
    keys, values = torch.randn(2, sum(lengths), kv_heads, DIM).unbind()
    for of_queries in (lengths, behind):
        query = torch.randn(sum(of_queries), HEADS, DIM)
        runs = Runs.of(of_queries, CPU), Runs.of(lengths, CPU)
        found = module._varlen(query, keys, values, *runs, sight)
        torch.testing.assert_close(found, packed_attention(query, keys, values, *runs, sight))


def test_paged_attention_binds(kernel: str) -> None:
    """Where the kernel has no tables of blocks, it is said so, and a cache is rows."""
    assert paged_kernel() == ("block_table" in SIGNATURES[kernel].parameters)
    if not paged_kernel():
        return
    for share in (1, HEADS // KV_HEADS):
        config = SimpleNamespace(params_dtype=torch.float32)
        stage: Any = SimpleNamespace(
            model=SimpleNamespace(config=config, device=CPU), blocks=[None], kv_heads=KV_HEADS, dim=DIM, share=share,
            sights=[Sight()],
        )  # fmt: skip
        pool = Pool(stage, 6, 4)
        pool.data.normal_()
        tables, last = torch.tensor([[3, 0, 5], [1, 4, 2]]), torch.tensor([9, 4])
        qkv = torch.randn(2, KV_HEADS, share + 2, DIM)
        found, wanted = (way(stage, pool, tables, last)(0, qkv) for way in (paged_attention, gathered_attention))
        torch.testing.assert_close(found, wanted)
