"""Context parallelism: the tokens of a pack cut over cp ranks, which gather each other's keys.

A pack, not a sequence, is cut into 2 cp equal chunks, and rank i takes chunks i and 2 cp - 1 - i: causal attention
costs each rank about the same (the zigzag of Megatron-core and of Llama 3's training, Grattafiori et al. 2024,
3.3.2). The queries of a chunk read the keys of its own and of earlier chunks, back to where their sequence begins, so
that every sequence that a chunk touches is one segment whose last query sees its last key.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from runtime.models.mcore import gather_from_sequence_parallel_region
from runtime.models.packed_attention import ReplayedTokens, RoutedTokens, Runs


@dataclass(frozen=True, eq=False)
class CutRuns:
    """The segments of a rank's two chunks. Megatron's layers hand it to the attention core in the place of `Runs`.

    of_queries, of_keys: tokens of each segment. spans: the keys that each chunk reads, as places in the pack. routed,
    replayed: as in `Runs`.
    """

    of_queries: Runs
    of_keys: Runs
    spans: tuple[tuple[int, int], tuple[int, int]]
    routed: RoutedTokens | None = None
    replayed: ReplayedTokens | None = None
    qkv_format: ClassVar[str] = "thd"

    @classmethod
    def of(cls, lengths: tuple[int, ...], cp: int, rank: int, device: torch.device) -> CutRuns:
        """From the lengths of the sequences of a pack, whose sum 2 cp divides."""
        starts = (0, *accumulate(lengths))
        queries: list[int] = []
        keys: list[int] = []
        spans: list[tuple[int, int]] = []
        for first, end in _chunks(starts[-1], cp, rank):
            touched = [(a, b) for a, b in pairwise(starts) if a < end and b > first]
            queries += [min(b, end) - max(a, first) for a, b in touched]
            keys += [min(b, end) - a for a, b in touched]
            spans.append((touched[0][0], end))
        return cls(Runs.of(tuple(queries), device), Runs.of(tuple(keys), device), (spans[0], spans[1]))

    def gathered(self, x: Tensor, group: Any) -> Tensor:
        """Keys or values of the segments, end to end, from those of this rank's tokens [width / cp, heads, dim].

        The gradient of what this rank gives is summed over the ranks that read it."""
        every = gather_from_sequence_parallel_region(x, group=group)
        chunks = every.unflatten(0, (group.size(), 2, -1))
        ordered = torch.cat([chunks[:, 0], chunks[:, 1].flip(0)]).flatten(0, 1)
        return torch.cat([ordered[first:end] for first, end in self.spans])


def _chunks(width: int, cp: int, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Places [first, end) in a pack of the two chunks of a rank."""
    size, rest = divmod(width, 2 * cp)
    assert not rest, f"a pack of {width} tokens does not divide into {2 * cp} chunks"
    early, late = rank * size, (2 * cp - 1 - rank) * size
    return (early, early + size), (late, late + size)


def own_places(width: int, cp: int, rank: int, device: torch.device) -> Tensor:
    """Places in a pack of the tokens that a rank has, in its order: int64 [width / cp]."""
    return torch.cat([torch.arange(first, end, device=device) for first, end in _chunks(width, cp, rank)])
