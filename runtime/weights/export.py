"""Weights out: the ranks of a model and rank 0 write a Hugging Face folder, gathered tensor by tensor.

Rank 0's machine keeps the output of a run, so the folder is made there. The first rank of a pipeline stage writes the
weights of its stage into it where it sees it, all stages at once; where it does not, on a machine without a folder in
common, it sends them to rank 0.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

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
    partial_of,
    weight_files,
    writing_weights,
)

WRITER = 0
Files = dict[str, list[Parameter]]


@torch.no_grad()
def export(
    layout: Layout,
    model: Model | None,
    folder: Path,
    source: Path | None = None,
    *,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model as a Hugging Face folder that takes the place of `folder` in one move; what was there goes to
    `NAME.1`. Adapters are merged into the weights, and written to `NAME-adapter` beside it as well.

    model: the part of this rank, None on rank 0 where the layout does not have it. dtype: of its parameters. Tokenizer
    files, and what `config.json` holds beyond the architecture, come from the folder `source` of rank 0. Collective
    over the ranks of the layout and rank 0; the folder is there once rank 0 returns.
    """
    files = weight_files(layout, dtype.itemsize, shard_bytes)
    if dist.get_rank() == WRITER:
        _collect(layout, model, folder, source, files, dtype)
    elif model is not None:
        _hand_over(model, folder, files)


def _collect(
    layout: Layout, model: Model | None, folder: Path, source: Path | None, files: Files, dtype: torch.dtype
) -> None:
    """On rank 0: have every stage in the folder, and put it in its place."""
    roots = {place.pp: rank for rank, place in layout.places.items() if place.tp == place.dp == place.cp == 0}
    others = [rank for rank in roots.values() if rank != WRITER]
    with writing_weights(folder):
        make_empty(layout.spec, folder)
        mark = torch.tensor(secrets.randbits(62))
        _probe(folder, mark).touch()
    for rank in others:
        dist.send(mark, rank)
    writes = {rank: bool(_answer(rank)) for rank in others}
    _probe(folder, mark).unlink()
    for stage, rank in sorted(roots.items()):
        if writes.get(rank):
            _answer(rank)  # its files are whole
            continue
        parameters = _received(layout, stage, rank, dtype)
        if rank == WRITER:
            assert model is not None, "rank 0 has a part of a layout that it is in"
            parameters = _whole_parameters(model)
        with writing_weights(folder):
            fill_stage(layout.spec, parameters, folder, files, stage)
    with writing_weights(folder):
        complete(layout.spec, dtype, folder, files, source)


def _hand_over(model: Model, folder: Path, files: Files) -> None:
    """On other ranks: write a stage where rank 0's folder is in sight, else send it; or what of it this rank has."""
    place = model.place
    if place.tp or place.dp or place.cp:
        if not (place.dp or place.cp) or _in_first_run(model):
            for _ in _whole_parameters(model):
                pass
        return
    mark = torch.tensor(0)
    dist.recv(mark, WRITER)
    sees = os.path.exists(_probe(folder, mark))
    dist.send(torch.tensor(int(sees)), WRITER)
    if sees:
        with writing_weights(folder):
            fill_stage(model.spec, _whole_parameters(model), folder, files, place.pp)
        dist.send(torch.tensor(1), WRITER)
        return
    for _, whole in _whole_parameters(model):
        dist.send(whole.contiguous(), WRITER)


def _probe(folder: Path, mark: Tensor) -> Path:
    """A file that no other folder of this name has."""
    return partial_of(folder) / f".probe-{mark.item()}"


def _answer(rank: int) -> int:
    said = torch.tensor(0)
    dist.recv(said, rank)
    return int(said.item())


def _received(layout: Layout, stage: int, rank: int, dtype: torch.dtype) -> Iterator[tuple[Parameter, Tensor]]:
    """Whole parameters of a stage, from its first rank."""
    for _, parameter in _stage_parameters(layout, stage):
        whole = torch.empty(parameter.shape, dtype=dtype)
        dist.recv(whole, rank)
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
    layout, writes = model.layout, model.place.dp == model.place.cp == model.place.tp == 0
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
