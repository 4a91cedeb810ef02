"""The safetensors files of a Hugging Face folder: that they are what index and config say, before a tensor is used."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from plans.documents import BadText, locate, parse_json, read_text, refuse
from plans.errors import RealplanError, nearest
from plans.layout import model_units
from plans.model import Head, ModelSpec
from plans.problems import Problem, shortened
from runtime.weights.hf_names import SCORE, hf_names, hf_shape
from runtime.weights.hf_quantised import Format, quantisation

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
VALUE_HEADS = (SCORE, "v_head.weight", "v_head.summary.weight")
MOST_INDEX_BYTES = 64 * 2**20
_ORIGIN = ".origin"
_POINTER = b"version https://git-lfs.github.com/spec/"
_OTHER_HEADS = ("score.", "v_head.", "value_head.")
_BUFFERS = (".rotary_emb.inv_freq", ".input_scale", ".k_scale", ".v_scale", ".activation_scale")
"""Endings of what older exporters saved and nobody needs: tables of angles, scales of activations."""


class WeightsError(RealplanError):
    """A checkpoint that cannot be read or does not fit the model."""


def note_origin(folder: Path, named: str) -> None:
    """Note in a folder for whose weights, which are not on this machine, it stands."""
    (folder / _ORIGIN).write_text(named, encoding="utf-8")


def origin_of(folder: Path) -> str:
    """The name of weights: that of the folder they are in, or for which it stands."""
    note = folder / _ORIGIN
    return note.read_text(encoding="utf-8") if os.path.isfile(note) else str(folder)


class WeightFiles:
    """The tensors of a Hugging Face folder, of one file or of those that an index names; files stay open.

    framework: `np` for checks alone, which load no torch then; tensors are read by `pt`.
    Raises WeightsError for files that are missing, broken or git-LFS pointers, for an index that contradicts its
    files, and for a quantisation that is not plain.
    """

    def __init__(self, folder: Path, framework: Literal["pt", "np"] = "pt") -> None:
        self.folder, self._framework = folder, framework
        self._open_files: dict[str, Any] = {}
        if os.path.isfile(folder / INDEX):
            self.files = _index(folder / INDEX)
            self._check_index()
        elif os.path.isfile(folder / SINGLE):
            self.files = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            found = [p.name for kind in ("*.bin", "*.pt", "*.gguf", "*.safetensors") for p in sorted(folder.glob(kind))]
            beside = f" (it has {', '.join(found[:3])})" if found else ""
            raise WeightsError(
                f"no weights at `{folder}`: it has neither {SINGLE} nor {INDEX}{beside}",
                "name a Hugging Face folder with safetensors; other formats must be converted first",
            )
        self._format: Format = quantisation(folder, WeightsError)

    def _open(self, file: str) -> Any:
        if file not in self._open_files:
            path = self.folder / file
            try:
                with path.open("rb") as start:
                    if start.read(len(_POINTER)) == _POINTER:
                        hint = f"`git lfs pull` in `{self.folder}`"
                        raise WeightsError(f"`{path}` is a git-LFS pointer, not the weights themselves", hint)
                self._open_files[file] = safe_open(path, self._framework)
            except OSError as error:
                hint = "download the folder again, whole"
                raise WeightsError(f"cannot read `{path}`: {error.strerror or error}", hint) from None
            except SafetensorError as error:
                hint = "the file is broken or cut off: download it again"
                raise WeightsError(f"cannot read `{path}`: {error}", hint) from None
        return self._open_files[file]

    def _check_index(self) -> None:
        """The index says of every file exactly which tensors it has."""
        said: dict[str, set[str]] = {}
        for name, file in self.files.items():
            said.setdefault(file, set()).add(name)
        for name, file in self.files.items():  # a file that is missing is said first
            if not os.path.isfile(self.folder / file):
                raise self._index_fault(name, f"`{shortened(name)}` is in `{shortened(file)}`, which is not there")
        for file, names in said.items():
            held = set(self._open(file).keys())
            for name in sorted(names - held)[:1]:
                raise self._index_fault(name, f"the index says that {file} has `{shortened(name)}`; it has not")
            for name in sorted(held - names)[:1]:
                where = f"places it in {shortened(self.files[name])}" if name in self.files else "does not have it"
                raise self._index_fault(name, f"{file} has `{shortened(name)}`, and the index {where}")

    def _index_fault(self, name: str, message: str) -> WeightsError:
        """The error of a tensor's line of the index."""
        path, hint = self.folder / INDEX, "index and files are of different downloads: fetch the folder again"
        text = read_text(path, WeightsError, "index", most=MOST_INDEX_BYTES)
        (found,) = locate(text, [Problem("index", message, hint, ("weight_map", name))])
        return WeightsError(f"{path}:{found.line}:{found.column}: {message}", hint)

    def find(self, name: str) -> str | None:
        """The name under which the checkpoint holds a tensor; a bare body has no `model.` prefix."""
        return next((n for n in (name, name.removeprefix("model.")) if n in self.files), None)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Any:
        """A tensor of the checkpoint to take slices of, multiplied by its scales where it is quantised; raises when it
        is missing or has another shape."""
        from runtime.weights.hf_parts import Scaled

        part, scale, shared = self._found(name, shape)
        if scale is None:
            return part
        return Scaled(part, self._open(self.files[scale]).get_tensor(scale), shape, *shared)

    def _found(self, name: str, shape: tuple[int, ...]) -> tuple[Any, str | None, tuple[int, int]]:
        """A tensor as it stands in its file, the name of its scales where it has some, and how many of its rows and
        columns share one; raises when the tensor is missing or has another shape, or scales that do not fit it."""
        found = self.find(name)
        if found is None:
            raise self._missing(name)
        part = self._open(self.files[found]).get_slice(found)
        if tuple(part.get_shape()) != shape:
            raise WeightsError(
                f"`{self.folder}`: tensor `{found}` has shape {part.get_shape()}; the model needs {list(shape)}",
                "check that the model of the plan is the one of these weights",
            )
        scale = self.scale_of(found)
        kind = part.get_dtype()
        if scale is None and not self._format.is_plain(kind):
            hint = "a folder with its scales, or one in bf16"
            raise WeightsError(f"`{self.folder}`: tensor `{found}` is {kind} and has no scales", hint)
        if scale is None:
            return part, None, (0, 0)
        scales = self._open(self.files[scale]).get_slice(scale).get_shape()
        shared = self._format.shared(shape, tuple(scales))
        if shared is None:
            raise WeightsError(
                f"tensor `{found}` of shape {list(shape)} has scales of shape {scales}",
                f"one scale, one per row, or one per block of {self._format.block[0]} x {self._format.block[1]}",
            )
        return part, scale, shared

    def scale_of(self, name: str) -> str | None:
        """The tensor with the scales of one that is held under `name`; None where it is not quantised."""
        return next((scale for scale in self._format.scales(name) if scale in self.files), None)

    def _missing(self, name: str) -> WeightsError:
        hint = nearest(name, list(self.files))
        if name == "lm_head.weight":
            hint = '"tie_word_embeddings": true in its config.json, if its head is its embedding; else another folder'
        return WeightsError(f"`{self.folder}` has no tensor `{name}`", hint)

    def check(self, spec: ModelSpec, *, trained: bool = True) -> None:
        """Raise WeightsError unless the folder has every tensor of the model, in its shape, and none that nobody would
        read. The value head of a model that is `trained` may be missing; heads of other roles are left alone."""
        wanted: set[str] = set()
        for parameter in (p for unit in model_units(spec.base) for p in unit.parameters):
            for i, name in enumerate(hf_names(spec, parameter.name)):
                if name == SCORE:
                    for head in filter(self.find, VALUE_HEADS):
                        self._found(head, (1, spec.hidden))
                    continue
                self._found(name, hf_shape(spec, parameter, i))
                wanted.add(self.find(name) or name)
        if spec.head is Head.VALUE and not trained and not any(map(self.find, VALUE_HEADS)):
            heads = ", ".join(VALUE_HEADS)
            raise WeightsError(
                f"`{self.folder}` has no value head ({heads}): as a model that is not trained it scores 0",
                "a folder of a reward model, such as reward-modelling writes",
            )
        free = _OTHER_HEADS if not spec.tied_embeddings and spec.head is Head.LM else (*_OTHER_HEADS, "lm_head.")
        for name in self._unread(wanted, free):
            announced = "set attention_bias or mlp_bias" if name.endswith(".bias") else "the right config.json"
            raise WeightsError(
                f"`{self.folder}` has a tensor `{name}` that the model of its config.json does not have",
                f"{announced}, if the model has it; else a folder without it",
            )

    def _unread(self, wanted: set[str], free: tuple[str, ...]) -> Iterable[str]:
        scales = {scale for name in wanted for scale in self._format.scales(name)}
        for name in self.files:
            if name not in wanted | scales and not name.startswith(free) and not name.endswith(_BUFFERS):
                yield name


def _index(path: Path) -> dict[str, str]:
    """Tensor -> file of an index; raises WeightsError unless it has such a map."""
    text = read_text(path, WeightsError, "index", most=MOST_INDEX_BYTES)
    try:
        data = parse_json(text)
    except BadText as error:
        refuse(WeightsError, path, [error.problem])
    found = data.get("weight_map") if isinstance(data, dict) else None
    hint = '"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors", ...}'
    if not isinstance(found, dict) or not found:
        problem = Problem("index", "the index has no `weight_map`", hint, ("weight_map",))
        refuse(WeightsError, path, locate(text, [problem]))
    for name, file in found.items():
        if not isinstance(file, str) or Path(file).name != file or "\0" in file:
            shown = f"`{shortened(name)}` is at {shortened(repr(file))}"
            problem = Problem("index", f"{shown}, which is no name of a file beside the index", hint,
                              ("weight_map", name))  # fmt: skip
            refuse(WeightsError, path, locate(text, [problem]))
    return found
