"""An ordinary Hugging Face folder out of whole parameters, put in place in one move."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from plans.documents import parse_json, read_text
from plans.files import free_name, writing
from plans.huggingface import config_from_spec
from plans.layout import EMBEDDING, Layout, Parameter, model_units
from plans.model import Head, ModelSpec
from plans.run_output import partial_of, replaced_of
from runtime.weights.adapters import adapter_folder, join_stages, merged, write_stage
from runtime.weights.hf_files import INDEX, SINGLE, WeightsError, origin_of
from runtime.weights.hf_names import hf_names, hf_shape
from runtime.weights.hf_parts import split

SHARD_BYTES = 5 * 10**9
_BESIDE_WEIGHTS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json",
    "chat_template*",
)  # fmt: skip


def write_folder(
    spec: ModelSpec,
    dtype: torch.dtype,
    parameters: Iterable[tuple[Parameter, Tensor]],
    folder: Path,
    source: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder (`runtime.weights.export`) from whole parameters in host memory, in the order of
    `model_units`. Not collective."""
    try:
        with writing_weights(folder):
            make_empty(spec, folder)
            files = weight_files(Layout(spec, (0,)), dtype.itemsize, shard_bytes)
            fill_stage(spec, parameters, folder, files)
            complete(spec, dtype, folder, files, source)
    finally:
        for made in _folders(spec, folder):
            shutil.rmtree(partial_export(made), ignore_errors=True)


def partial_export(folder: Path) -> Path:
    """Where a folder stands before it is whole."""
    return folder.with_name(partial_of(folder.name))


def _folders(spec: ModelSpec, folder: Path) -> list[Path]:
    """What an export makes: the adapter, where there is one, and the model."""
    return [adapter_folder(folder), folder] if spec.lora else [folder]


def make_empty(spec: ModelSpec, folder: Path) -> None:
    for made in map(partial_export, _folders(spec, folder)):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)


def fill_stage(
    spec: ModelSpec,
    parameters: Iterable[tuple[Parameter, Tensor]],
    folder: Path,
    files: dict[str, list[Parameter]],
    stage: int = 0,
) -> None:
    """Write a stage's weights, and its adapters, which are merged into them."""
    adapters: dict[str, Tensor] = {}
    _write_weights(spec, merged(spec, parameters, adapters), partial_export(folder), files)
    if adapters:
        write_stage(partial_export(adapter_folder(folder)), stage, adapters)


def complete(
    spec: ModelSpec,
    dtype: torch.dtype,
    folder: Path,
    files: dict[str, list[Parameter]],
    source: Path | None,
    *,
    keeps: bool = True,
) -> None:
    """Write what goes with the weights, and give the folders their names. source: the weights that training began
    with, beside which adapters were trained. keeps: folders of these names go to `NAME.1`."""
    partial = partial_export(folder)
    if spec.lora:
        join_stages(spec, partial_export(adapter_folder(folder)), "" if source is None else origin_of(source))
    _write_index(spec, dtype, partial, files)
    _write_config(spec, dtype, partial, source)
    for made in _folders(spec, folder):
        _replace(made, partial_export(made), keeps=keeps)


@contextmanager
def writing_weights(folder: Path) -> Iterator[None]:
    """OutputError with the folder where the system refuses, also through safetensors, which has its own error."""
    with writing(folder):
        try:
            yield
        except SafetensorError as error:
            found = re.search(r"\(os error (\d+)\)", str(error))
            if found is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from None


def weight_files(layout: Layout, element_bytes: int, shard_bytes: int = SHARD_BYTES) -> dict[str, list[Parameter]]:
    """File name -> the parameters it holds: runs of each stage of at most `shard_bytes`. Needs no communication."""
    units = {unit.name: unit for unit in model_units(layout.spec.base)}
    runs: list[list[Parameter]] = []
    for stage in range(layout.pp):
        size = 0
        runs.append([])
        for name in layout.stage_units(stage):
            for parameter in () if is_copy(name, stage) else units[name].parameters:
                nbytes = parameter.size * element_bytes
                if runs[-1] and size + nbytes > shard_bytes:
                    runs.append([])
                    size = 0
                runs[-1].append(parameter)
                size += nbytes
    if len(runs) == 1:
        return {SINGLE: runs[0]}
    return {f"model-{i + 1:05d}-of-{len(runs):05d}.safetensors": run for i, run in enumerate(runs)}


def is_copy(unit: str, stage: int) -> bool:
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


def _replace(folder: Path, partial: Path, *, keeps: bool) -> None:
    """Put `partial` in the place of `folder`; a reader finds the old folder or the new one, never a mixture."""
    mode = stat.S_IMODE(partial.stat().st_mode) & 0o666  # what the umask leaves
    for path in partial.iterdir():
        path.chmod(mode)  # safetensors writes files that no other user can read
    old = free_name(folder) if keeps else folder.with_name(replaced_of(folder.name))
    if os.path.lexists(folder):
        folder.rename(old)
    partial.rename(folder)
    if not keeps:
        shutil.rmtree(old, ignore_errors=True)
