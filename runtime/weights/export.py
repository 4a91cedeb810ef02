"""Weights out: an ordinary Hugging Face folder, gathered tensor by tensor and put in place in one move."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from plans.documents import parse_json, read_text
from plans.files import free_name, writing
from plans.huggingface import config_from_spec
from plans.layout import EMBEDDING, Layout, Parameter, expert_of, model_units
from plans.model import Head, ModelSpec
from runtime.models.model import Model, named_shards
from runtime.models.shards import unshard
from runtime.weights.adapters import adapter_folder, join_stages, merged, write_stage
from runtime.weights.hf_files import INDEX, SINGLE, WeightsError
from runtime.weights.hf_names import hf_names, hf_shape
from runtime.weights.hf_parts import split

SHARD_BYTES = 5 * 10**9
_BESIDE_WEIGHTS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json",
    "chat_template*",
)  # fmt: skip


@torch.no_grad()
def export(model: Model, folder: Path, source: Path | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model as a Hugging Face folder that takes the place of `folder` in one move; what was there goes to
    `NAME.1`. Adapters are merged into the weights, and written to `NAME-adapter` beside it as well.

    Tokenizer files, and what `config.json` holds beyond the architecture, come from the folder `source`. Collective
    over the ranks of the first replica (dp = 0) and of the first run of experts; others return at once. The ranks must
    see one file system.
    """
    if model.place.dp or model.place.cp:
        if _in_first_run(model):
            for _ in _whole_parameters(model):
                pass
        return
    root = model.place.tp == 0 and model.first_stage
    if root:
        with _writing(folder):
            _make_empty(model.spec, folder)
    dist.barrier(model.groups.mp)
    dtype = model.config.params_dtype
    files = weight_files(model.layout, dtype.itemsize, shard_bytes)
    with _writing(folder):
        _write_stage(model.spec, _whole_parameters(model), folder, files, model.place.pp)
    dist.barrier(model.groups.mp)
    if root:
        with _writing(folder):
            _complete(model.spec, dtype, folder, files, source, str(source or ""))
    dist.barrier(model.groups.mp)


def partial_of(folder: Path) -> Path:
    """Where a folder stands before it is whole."""
    return folder.with_name(f".{folder.name}.partial")


def _folders(spec: ModelSpec, folder: Path) -> list[Path]:
    """What an export makes: the adapter, where there is one, and the model."""
    return [adapter_folder(folder), folder] if spec.lora else [folder]


def _make_empty(spec: ModelSpec, folder: Path) -> None:
    for made in map(partial_of, _folders(spec, folder)):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)


def _write_stage(
    spec: ModelSpec,
    parameters: Iterable[tuple[Parameter, Tensor]],
    folder: Path,
    files: dict[str, list[Parameter]],
    stage: int = 0,
) -> None:
    """Write a stage's weights, and its adapters, which are merged into them."""
    adapters: dict[str, Tensor] = {}
    _write_weights(spec, merged(spec, parameters, adapters), partial_of(folder), files)
    if adapters:
        write_stage(partial_of(adapter_folder(folder)), stage, adapters)


def _complete(
    spec: ModelSpec, dtype: torch.dtype, folder: Path, files: dict[str, list[Parameter]], source: Path | None, base: str
) -> None:
    """Write what goes with the weights, and give the folders their names. base: the name of the weights beside which
    adapters were trained."""
    partial = partial_of(folder)
    if spec.lora:
        join_stages(spec, partial_of(adapter_folder(folder)), base)
    _write_index(spec, dtype, partial, files)
    _write_config(spec, dtype, partial, source)
    for made in _folders(spec, folder):
        _replace(made, partial_of(made))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """OutputError with the folder where the system refuses, also through safetensors, which has its own error."""
    with writing(folder):
        try:
            yield
        except SafetensorError as error:
            found = re.search(r"\(os error (\d+)\)", str(error))
            if found is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from None


def write_folder(
    spec: ModelSpec,
    dtype: torch.dtype,
    parameters: Iterable[tuple[Parameter, Tensor]],
    folder: Path,
    source: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    *,
    base: str = "",
) -> None:
    """The same folder from whole parameters in host memory, in the order of `model_units`. Not collective. base: the
    name of the weights beside which adapters were trained, of which `source` may be a copy."""
    try:
        with _writing(folder):
            _make_empty(spec, folder)
            files = weight_files(Layout(spec, (0,)), dtype.itemsize, shard_bytes)
            _write_stage(spec, parameters, folder, files)
            _complete(spec, dtype, folder, files, source, base or str(source or ""))
    finally:
        for made in _folders(spec, folder):
            shutil.rmtree(partial_of(made), ignore_errors=True)


def weight_files(layout: Layout, element_bytes: int, shard_bytes: int = SHARD_BYTES) -> dict[str, list[Parameter]]:
    """File name -> the parameters it holds: runs of each stage of at most `shard_bytes`. Needs no communication."""
    units = {unit.name: unit for unit in model_units(layout.spec.base)}
    runs: list[list[Parameter]] = []
    for stage in range(layout.pp):
        size = 0
        runs.append([])
        for name in layout.stage_units(stage):
            for parameter in () if _is_copy(name, stage) else units[name].parameters:
                nbytes = parameter.size * element_bytes
                if runs[-1] and size + nbytes > shard_bytes:
                    runs.append([])
                    size = 0
                runs[-1].append(parameter)
                size += nbytes
    if len(runs) == 1:
        return {SINGLE: runs[0]}
    return {f"model-{i + 1:05d}-of-{len(runs):05d}.safetensors": run for i, run in enumerate(runs)}


def _is_copy(unit: str, stage: int) -> bool:
    return unit == EMBEDDING and stage > 0


def _write_weights(
    spec: ModelSpec, parameters: Iterable[tuple[Parameter, Tensor]], folder: Path, files: dict[str, list[Parameter]]
) -> None:
    file_of = {parameter.name: file for file, run in files.items() for parameter in run}
    pending: dict[str, Tensor] = {}
    open_file = ""
    for parameter, whole in parameters:
        file = file_of[parameter.name]
        if pending and file != open_file:
            save_file(pending, folder / open_file, metadata={"format": "pt"})
            pending = {}
        open_file = file
        pending |= {name: part.contiguous() for name, part in split(spec, parameter, whole).items()}
    if pending:
        save_file(pending, folder / open_file, metadata={"format": "pt"})


def _in_first_run(model: Model) -> bool:
    """Whether this rank holds experts that the stage's first rank writes."""
    layout, rank = model.layout, dist.get_rank()
    return bool(model.spec.experts) and layout.ranks.index(rank) % (len(layout.ranks) // layout.pp) < layout.ep


def _whole_parameters(model: Model) -> Iterator[tuple[Parameter, Tensor]]:
    """Whole parameters of this stage in host memory, on its first rank; the others only send."""
    layout, writes = model.layout, model.place.dp == model.place.cp == model.place.tp == 0
    held = {parameter.name: shard.data for parameter, shard in named_shards(model)}
    units = {unit.name: unit for unit in model_units(model.spec)}
    stage = [name for name in layout.stage_units(model.place.pp) if not _is_copy(name, model.place.pp)]
    for number, parameter in [(expert_of(name), p) for name in stage for p in units[name].parameters]:
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


def _write_index(spec: ModelSpec, dtype: torch.dtype, folder: Path, files: dict[str, list[Parameter]]) -> None:
    if SINGLE in files:
        return
    places: dict[str, str] = {}
    elements = 0
    for file, run in files.items():
        for parameter in run:
            for i, name in enumerate(hf_names(spec, parameter.name)):
                places[name] = file
                elements += prod(hf_shape(spec, parameter, i))
    index = {"metadata": {"total_size": elements * dtype.itemsize}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write_config(spec: ModelSpec, dtype: torch.dtype, folder: Path, source: Path | None) -> None:
    config = config_from_spec(spec)
    if source is not None:
        if os.path.isfile(source / "config.json"):
            config = parse_json(read_text(source / "config.json", WeightsError, "config"))
        for pattern in _BESIDE_WEIGHTS:
            for path in source.glob(pattern):
                shutil.copy2(path, folder)
    text = json.dumps(_adapt(config, spec, dtype), indent=2) + "\n"
    (folder / "config.json").write_text(text, "utf-8")


def _adapt(config: dict[str, Any], spec: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
    """The config with the precision and the head of the exported model."""
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if spec.head is Head.VALUE:
        body = config["architectures"][0].split("For")[0]
        config["architectures"] = [f"{body}ForSequenceClassification"]
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "tie_word_embeddings": False}
    return config


def _replace(folder: Path, partial: Path) -> None:
    """Put `partial` in the place of `folder`; a reader finds the old folder or the new one, never a mixture."""
    mode = stat.S_IMODE(partial.stat().st_mode) & 0o666  # what the umask leaves
    for path in partial.iterdir():
        path.chmod(mode)  # safetensors writes files that no other user can read
    if os.path.lexists(folder):
        folder.rename(free_name(folder))
    partial.rename(folder)
