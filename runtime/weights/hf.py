"""Weights in: Hugging Face safetensors, of which each rank reads only its parts, or random ones."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from plans.layout import Parameter
from plans.model import ModelSpec
from runtime.models.model import Model, named_shards
from runtime.models.shards import shard
from runtime.weights.hf_files import VALUE_HEADS, WeightFiles
from runtime.weights.hf_names import SCORE, has_vocabulary, hf_names, hf_shape
from runtime.weights.hf_parts import join

INITIAL_STD = 0.02


@torch.no_grad()
def load_weights(model: Model, folder: Path, *, trained: bool = True, seed: int = 0) -> None:
    """Fill a model from a Hugging Face folder; adapters begin as `random_weights` has them. A value head that the
    folder lacks starts from zero, unless it is not `trained`: it would give zero for everything, and WeightsError says
    so.

    Raises WeightsError unless the folder has exactly the model's tensors, in their shapes (`Checkpoint.check`). Not
    collective.
    """
    checkpoint = WeightFiles(folder)
    spec, place = model.spec, model.place
    checkpoint.check(spec, trained=trained)
    for parameter, target in named_shards(model):
        if parameter.adapter:
            target.copy_(shard(parameter, random_parameter(spec, parameter, seed), model.layout.tp, place.tp))
            continue
        names = hf_names(spec, parameter.name)
        if names == (SCORE,):
            names = tuple(name for name in VALUE_HEADS if checkpoint.find(name))[:1]
            if not names:
                target.zero_()
                continue
        parts = [checkpoint.tensor(name, hf_shape(spec, parameter, i)) for i, name in enumerate(names)]
        target.copy_(join(spec, parameter, parts, model.layout.tp, place.tp))


def whole_parameter(files: WeightFiles, spec: ModelSpec, parameter: Parameter) -> Tensor:
    """A whole parameter of a language model from the tensors of a Hugging Face folder."""
    names = hf_names(spec, parameter.name)
    parts = [files.tensor(name, hf_shape(spec, parameter, i)) for i, name in enumerate(names)]
    return join(spec, parameter, parts, 1, 0)


@torch.no_grad()
def random_weights(model: Model, seed: int) -> None:
    """Fill a model with weights that depend on the seed and the parameter's name alone, not on the layout.

    Matrices are normal with standard deviation 0.02, norms one, biases and padding rows of the vocabulary zero. Of an
    adapter B is zero and A uniform up to 1 / sqrt(in), as `peft` begins.
    """
    for parameter, target in named_shards(model):
        whole = random_parameter(model.spec, parameter, seed)
        target.copy_(shard(parameter, whole, model.layout.tp, model.place.tp))


def random_parameter(spec: ModelSpec, parameter: Parameter, seed: int) -> Tensor:
    """A whole random parameter, float32 on the CPU."""
    if parameter.name.endswith((".bias", ".lora_b")):
        return torch.zeros(parameter.shape)
    if len(parameter.shape) == 1:
        return torch.zeros(parameter.shape) if spec.norm_offset else torch.ones(parameter.shape)
    digest = hashlib.blake2b(f"{seed}/{parameter.name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    if parameter.adapter:
        bound = parameter.shape[1] ** -0.5
        return torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
    whole = torch.randn(parameter.shape, generator=generator).mul_(INITIAL_STD)
    if has_vocabulary(spec, parameter):
        whole[spec.vocab :] = 0
    return whole
