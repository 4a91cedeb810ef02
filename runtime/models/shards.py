"""Tensor-parallel parts of one parameter: which part a rank holds, and whole from parts (`plans.layout.Parameter`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plans.layout import Parameter


def shard(parameter: Parameter, whole: Tensor, tp: int, rank: int) -> Tensor:
    """Part `rank` of `tp`: that fraction of every block, one after the other."""
    if parameter.axis is None or tp == 1:
        return whole
    axis = parameter.axis
    return torch.cat([block.chunk(tp, axis)[rank] for block in whole.chunk(parameter.blocks, axis)], axis)


def unshard(parameter: Parameter, parts: Sequence[Tensor]) -> Tensor:
    """The whole parameter from its parts in tp order."""
    if parameter.axis is None or len(parts) == 1:
        return parts[0]
    axis = parameter.axis
    blocks = zip(*(part.chunk(parameter.blocks, axis) for part in parts), strict=True)
    return torch.cat([torch.cat(block, axis) for block in blocks], axis)
