"""What routers chose in generation, from the stages of a pipeline to all of its ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.models.model import Model
from runtime.routes import Routes

_MOST_BYTES = 2**20
"""Of the routes of a layer that are on their way between stages at a time."""


def whole_routes(model: Model, own: Sequence[Tensor]) -> Routes:
    """Routes of all layers from those of this rank's stage, of each sample [tokens - 1, layers of the stage, experts
    per token]. Collective over the pipeline; the tp ranks of a stage have the same ones already."""
    if model.layout.pp == 1:
        return Routes(tuple(own))
    rows: list[Tensor] = []
    for part in _parts(own):
        rows += _gathered(model, part)
    return Routes(tuple(rows))


def _gathered(model: Model, own: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Some samples' routes of all layers; stages may have different numbers of them."""
    ranks, mine = dist.get_process_group_ranks(model.groups.pp), torch.cat(list(own))
    pieces = []
    for stage, source in enumerate(ranks):
        shape = (len(mine), len(model.layout.chunk_layers(stage)), mine.shape[2])
        piece = mine if stage == model.place.pp else mine.new_empty(shape)
        dist.broadcast(piece.view(torch.uint8), src=source, group=model.groups.pp)
        pieces.append(piece)
    return torch.split(torch.cat(pieces, 1), [len(row) for row in own])


def _parts(own: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Samples in runs of at most `_MOST_BYTES`, or of one; the same runs on every stage, whose layers may differ."""
    part: list[Tensor] = []
    tokens = 0
    for row in own:
        if part and (tokens + len(row)) * row.shape[2] * row.element_size() > _MOST_BYTES:
            yield part
            part, tokens = [], 0
        part.append(row)
        tokens += len(row)
    if part:
        yield part
