"""Parameters out of the tensors of a Hugging Face folder, and back: slices are joined, scaled and cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from plans.layout import Parameter
from plans.model import ModelSpec
from runtime.weights.hf_names import QKV, hf_names, part_shapes

_INTERLEAVED = ("glm", "glm4")
"""Families that rotate neighbours (2i, 2i + 1) of a head's dimensions, not (i, i + rotated / 2)."""


class Sliceable(Protocol):
    """A tensor in a file, or in memory, of which parts can be taken."""

    def __getitem__(self, index: tuple[slice, ...] | slice) -> Tensor: ...


@dataclass(frozen=True)
class Scaled:
    """A quantised matrix to take slices of, float32: element (i, j) times scale (i // rows, j // columns).

    scale: of shape [blocks of rows, blocks of columns], or flat where the blocks are as wide as the matrix."""

    part: Sliceable
    scale: Tensor
    shape: tuple[int, ...]
    rows: int
    columns: int

    def __getitem__(self, index: tuple[slice, ...] | slice) -> Tensor:
        cuts = index if isinstance(index, tuple) else (index,)
        cuts = (*cuts, *(slice(None) for _ in range(2 - len(cuts))))
        table = self.scale.float()
        table = table.reshape(-1, 1) if table.dim() < 2 else table
        row, column = (torch.arange(extent)[cut] for extent, cut in zip(self.shape, cuts, strict=True))
        return self.part[cuts].float() * table[row // self.rows][:, column // self.columns]


@dataclass(frozen=True)
class _Below:
    """The rows of a tensor from `first` on, of which none is read before it is asked for."""

    whole: Sliceable
    first: int

    def __getitem__(self, index: tuple[slice, ...] | slice) -> Tensor:
        rows, *rest = index if isinstance(index, tuple) else (index,)
        return self.whole[(slice(rows.start + self.first, rows.stop + self.first), *rest)]


def join(spec: ModelSpec, parameter: Parameter, tensors: Sequence[Sliceable], tp: int, rank: int) -> Tensor:
    """This tp rank's part of a parameter, read from the Hugging Face tensors without reading more than it holds."""
    shapes = part_shapes(spec, parameter)
    parts = list(tensors)
    if len(parts) < len(shapes):
        above = accumulate((shape[0] for shape in shapes[:-1]), initial=0)
        parts = [_Below(parts[0], first) for first in above]
    if QKV in parameter.name:
        groups = range(rank * spec.kv_heads // tp, (rank + 1) * spec.kv_heads // tp)
        return torch.cat([_rows(parts[i], spec, group, i) for group in groups for i in range(3)])
    slices = [_run(shape, parameter, tp, rank) for shape in shapes]
    tensor = torch.cat([part[cut] for part, cut in zip(parts, slices, strict=True)])
    missing = parameter.shape[0] // tp - tensor.shape[0] if parameter.axis == 0 else 0
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


def _rows(part: Sliceable, spec: ModelSpec, group: int, index: int) -> Tensor:
    """Rows of a group of query (index 0), key (1) or value (2), rotated halves apart."""
    rows = spec.head_dim * (spec.heads // spec.kv_heads if index == 0 else 1)
    found = part[group * rows : (group + 1) * rows]
    if index == 2 or spec.family not in _INTERLEAVED:
        return found
    return found.view(-1, spec.head_dim, *found.shape[1:])[:, _apart(spec)].flatten(0, 1)


def _apart(spec: ModelSpec) -> Tensor:
    """Which of a head's interleaved dimensions stands at each place here: even ones, odd ones, those not rotated."""
    turned = torch.arange(spec.rotated)
    return torch.cat([turned[0::2], turned[1::2], torch.arange(spec.rotated, spec.head_dim)])


def _run(shape: tuple[int, ...], parameter: Parameter, tp: int, rank: int) -> tuple[slice, ...]:
    """What a tp rank reads of a tensor; a vocabulary is cut where its padded rows are."""
    cuts = [slice(0, extent) for extent in shape]
    if parameter.axis is not None:
        axis, extent = parameter.axis, shape[parameter.axis]
        step = parameter.shape[axis] // parameter.blocks // tp
        cuts[axis] = slice(min(rank * step, extent), min((rank + 1) * step, extent))
    return tuple(cuts)


def split(spec: ModelSpec, parameter: Parameter, whole: Tensor) -> dict[str, Tensor]:
    """The Hugging Face tensors of a whole parameter; padding of the vocabulary is dropped."""
    names, shapes = hf_names(spec, parameter.name), part_shapes(spec, parameter)
    if QKV in parameter.name:
        groups = whole.view(spec.kv_heads, -1, *whole.shape[1:])
        per = spec.head_dim * (spec.heads // spec.kv_heads)
        parts = [part.flatten(0, 1) for part in torch.split(groups, [per, spec.head_dim, spec.head_dim], dim=1)]
        if spec.family in _INTERLEAVED:
            back = _apart(spec).argsort()
            heads = (part.view(-1, spec.head_dim, *part.shape[1:]) for part in parts[:2])
            parts = [*(head[:, back].flatten(0, 1) for head in heads), parts[2]]
    else:
        blocks = zip(whole.chunk(len(shapes)), shapes, strict=True)
        parts = [part[: shape[0]] for part, shape in blocks]
    if len(names) < len(parts):
        parts = [torch.cat(parts)]
    return dict(zip(names, parts, strict=True))
