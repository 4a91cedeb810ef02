"""Weights out: the ranks of a model and rank 0 write a Hugging Face folder, gathered tensor by tensor.

Rank 0's machine keeps the output of a run, so the folder is made there. The first rank of a pipeline stage writes the
weights of its stage into it where it sees it, all stages at once; where it does not, on a machine without a folder in
common, it sends them to rank 0, one stage after the other.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plans.layout import Layout, Parameter, expert_of, model_units
from runtime.models.model import Model, named_shards
from runtime.models.shards import unshard
from runtime.weights.hf_folder import (
    SHARD_BYTES,
    complete,
    fill_stage,
    is_copy,
    make_empty,
    partial_export,
    weight_files,
    writing_weights,
)

WRITER = 0
SLOWEST_BYTES_S = 1e7
"""How slow the network or the disk may be before an export is given up."""

Files = dict[str, list[Parameter]]


def export_s(layout: Layout, dtype: torch.dtype) -> float:
    """How long an export may take, seconds, beyond what ranks otherwise wait for each other."""
    return layout.spec.params * dtype.itemsize / SLOWEST_BYTES_S


@torch.no_grad()
def export(
    layout: Layout,
    model: Model | None,
    folder: Path,
    source: Path | None = None,
    *,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
    group: Any = None,
    keeps: bool = True,
) -> None:
    """Write a model as a Hugging Face folder that takes the place of `folder` in one move; what was there goes to
    `NAME.1`, or nowhere (`keeps`). Adapters are merged into the weights, and written to `NAME-adapter` beside it too.

    model: the part of this rank, None where it has none; dtype: of its parameters. Tokenizer files, and what
    `config.json` holds beyond the architecture, come from the folder `source` of rank 0. Collective over all ranks, in
    `group`, in which others wait while a stage is written; the folder is there when it returns.
    """
    files = weight_files(layout, dtype.itemsize, shard_bytes)
    root = dist.get_rank() == WRITER
    stage = -1 if model is None else model.place.pp
    mark = torch.tensor(secrets.randbits(62))
    if root:
        with writing_weights(folder):
            make_empty(layout.spec, folder)
            _probe(folder, mark).touch()
    dist.broadcast(mark, WRITER, group)
    sees = torch.zeros(layout.pp)
    if model is not None and _writes(model):
        sees[stage] = os.path.exists(_probe(folder, mark))
    dist.all_reduce(sees, group=group)
    if root:
        _probe(folder, mark).unlink()
    if model is not None and sees[stage]:
        _write(model, folder, files)
    for other in (stage for stage in range(layout.pp) if not sees[stage]):
        dist.barrier(group)  # stages take turns, so that the ranks of one wait for each other no longer than usual
        if root:
            with writing_weights(folder):
                fill_stage(layout.spec, _received(layout, other, dtype, group), folder, files, other)
        elif model is not None and stage == other:
            for _, whole in _whole_parameters(model):
                dist.send(whole.contiguous(), WRITER, group)
    dist.barrier(group)
    if root:
        with writing_weights(folder):
            complete(layout.spec, dtype, folder, files, source, keeps=keeps)
    dist.barrier(group)


def _probe(folder: Path, mark: Tensor) -> Path:
    """A file that no other folder of this name has."""
    return partial_export(folder) / f".probe-{mark.item()}"


def _writes(model: Model) -> bool:
    """Whether this rank is the first one of its stage."""
    return model.place.dp == model.place.cp == model.place.tp == 0


def _write(model: Model, folder: Path, files: Files) -> None:
    """Write this rank's stage, or help its first rank."""
    if _writes(model):
        with writing_weights(folder):
            fill_stage(model.spec, _whole_parameters(model), folder, files, model.place.pp)
    else:
        for _ in _whole_parameters(model):
            pass


def _received(layout: Layout, stage: int, dtype: torch.dtype, group: Any) -> Iterator[tuple[Parameter, Tensor]]:
    """Whole parameters of a stage, from its first rank."""
    rank = next(r for r, at in layout.places.items() if at.pp == stage and at.dp == at.cp == at.tp == 0)
    for _, parameter in _stage_parameters(layout, stage):
        whole = torch.empty(parameter.shape, dtype=dtype)
        dist.recv(whole, rank, group)
        yield parameter, whole


def _stage_parameters(layout: Layout, stage: int) -> Iterator[tuple[int | None, Parameter]]:
    """The parameters that a stage writes, each with the number of its expert."""
    units = {unit.name: unit for unit in model_units(layout.spec)}
    for name in layout.stage_units(stage):
        if not is_copy(name, stage):
            yield from ((expert_of(name), parameter) for parameter in units[name].parameters)


def _in_first_run(model: Model) -> bool:
    """Whether this rank holds experts that the stage's first rank writes."""
    layout, rank = model.layout, dist.get_rank()
    return bool(model.spec.experts) and layout.ranks.index(rank) % (len(layout.ranks) // layout.pp) < layout.ep


def _whole_parameters(model: Model) -> Iterator[tuple[Parameter, Tensor]]:
    """Whole parameters of this stage in host memory, on its first rank; the others only send."""
    layout, writes = model.layout, _writes(model)
    if (model.place.dp or model.place.cp) and not _in_first_run(model):
        return
    held = {parameter.name: shard.data for parameter, shard in named_shards(model)}
    for number, parameter in _stage_parameters(layout, model.place.pp):
        if number is not None:
            whole = _expert(model, parameter, held.get(parameter.name), number)
        elif model.place.dp or model.place.cp:
            continue
        else:
            parts = _gather(model, held[parameter.name]) if parameter.axis is not None else [held[parameter.name]]
            whole = unshard(parameter, parts) if writes else None
        if writes and whole is not None:
            yield parameter, whole.to("cpu", copy=True)


def _expert(model: Model, parameter: Parameter, held: Tensor | None, number: int) -> Tensor | None:
    """An expert's parameter on the stage's first rank, from the rank of the first run that holds it."""
    group, owner = model.groups.ep, number // (model.spec.experts // model.layout.ep)
    if not _in_first_run(model):
        return None
    if owner == 0:
        return held
    if group.rank() == owner:
        assert held is not None
        dist.send(held.contiguous(), dist.get_global_rank(group, 0), group=group)
    elif group.rank() == 0:
        whole = torch.empty(parameter.shape, dtype=model.config.params_dtype, device=model.device)
        dist.recv(whole, dist.get_global_rank(group, owner), group=group)
        return whole
    return None


def _gather(model: Model, part: Tensor) -> Sequence[Tensor]:
    if model.layout.tp == 1:
        return [part]
    group = model.groups.tp
    parts = [torch.empty_like(part) for _ in range(model.layout.tp)] if model.place.tp == 0 else None
    dist.gather(part.contiguous(), parts, dst=dist.get_global_rank(group, 0), group=group)
    return parts or []
