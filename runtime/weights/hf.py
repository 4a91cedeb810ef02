"""Weights in: Hugging Face safetensors, of which each rank reads only its parts, or random ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from plans.errors import RealplanError, nearest
from plans.layout import Parameter
from plans.model import ModelSpec
from runtime.models.model import Model, named_shards
from runtime.models.shards import shard
from runtime.weights.hf_names import SCORE, has_vocabulary, hf_names, hf_shape, join

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
VALUE_HEADS = (SCORE, "v_head.weight", "v_head.summary.weight")
INITIAL_STD = 0.02


class WeightsError(RealplanError):
    """A checkpoint that cannot be read or does not fit the model."""


class Checkpoint:
    """The safetensors files of a Hugging Face folder, opened when first read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        if (folder / INDEX).is_file():
            self.files: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        elif (folder / SINGLE).is_file():
            self.files = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise WeightsError(
                f"no weights at `{folder}`: it has neither {SINGLE} nor {INDEX}",
                "name a Hugging Face folder with safetensors; other formats must be converted first",
            )

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, "pt")
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"cannot read `{self.folder / file}`: {error}") from None
        return self._files[file]

    def find(self, name: str) -> str | None:
        """The name under which the checkpoint holds a tensor; a bare body has no `model.` prefix."""
        return next((n for n in (name, name.removeprefix("model.")) if n in self.files), None)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Any:
        """A tensor of the checkpoint to take slices of; raises when it is missing or has another shape."""
        found = self.find(name)
        if found is None:
            raise WeightsError(f"`{self.folder}` has no tensor `{name}`", nearest(name, list(self.files)))
        part = self._open(self.files[found]).get_slice(found)
        if tuple(part.get_shape()) != shape:
            raise WeightsError(
                f"`{self.folder}`: tensor `{found}` has shape {part.get_shape()}; the model needs {list(shape)}",
                "check that the model of the plan is the one of these weights",
            )
        return part


@torch.no_grad()
def load_weights(model: Model, folder: Path) -> None:
    """Fill a model from a Hugging Face folder. A value head that the folder lacks starts from zero.

    Raises WeightsError when files or tensors are missing or have other shapes. Not collective.
    """
    checkpoint = Checkpoint(folder)
    spec, place = model.spec, model.place
    for parameter, target in named_shards(model):
        names = hf_names(spec, parameter.name)
        if names == (SCORE,):
            names = tuple(name for name in VALUE_HEADS if checkpoint.find(name))[:1]
            if not names:
                target.zero_()
                continue
        parts = [checkpoint.tensor(name, hf_shape(spec, parameter, i)) for i, name in enumerate(names)]
        target.copy_(join(spec, parameter, parts, model.layout.tp, place.tp))


@torch.no_grad()
def random_weights(model: Model, seed: int) -> None:
    """Fill a model with weights that depend on the seed and the parameter's name alone, not on the layout.

    Matrices are normal with standard deviation 0.02, norms one, biases and padding rows of the vocabulary zero.
    """
    for parameter, target in named_shards(model):
        whole = random_parameter(model.spec, parameter, seed)
        target.copy_(shard(parameter, whole, model.layout.tp, model.place.tp))


def random_parameter(spec: ModelSpec, parameter: Parameter, seed: int) -> Tensor:
    """A whole random parameter, float32 on the CPU."""
    if parameter.name.endswith(".bias"):
        return torch.zeros(parameter.shape)
    if len(parameter.shape) == 1:
        return torch.ones(parameter.shape)
    digest = hashlib.blake2b(f"{seed}/{parameter.name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    whole = torch.randn(parameter.shape, generator=generator).mul_(INITIAL_STD)
    if has_vocabulary(spec, parameter):
        whole[spec.vocab :] = 0
    return whole
