"""Megatron models from a ModelSpec and a Layout, and their parameters under the names of `plans.layout`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from plans.layout import Layout, Parameter, Place, model_units
from plans.model import ModelSpec
from plans.strategy import Recompute
from runtime.models.architecture import build_chunk, transformer_config
from runtime.models.experts import lay_out_experts
from runtime.models.mcore import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from runtime.models.support import check_runnable

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


@dataclass(frozen=True, eq=False)
class Model:
    """This rank's part of a model.

    chunks: Megatron modules of this pipeline stage, more than one when interleaved. config: Megatron's, shared by the
    chunks. groups: the process groups of the layout.
    """

    layout: Layout
    config: Any
    groups: Any
    chunks: tuple[Any, ...]
    device: torch.device

    @property
    def spec(self) -> ModelSpec:
        """Architecture."""
        return self.layout.spec

    @cached_property
    def place(self) -> Place:
        """Coordinates of this rank."""
        return self.layout.places[torch.distributed.get_rank()]

    @property
    def first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.place.pp == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank has the head."""
        return self.place.pp == self.layout.pp - 1


def build_model(
    layout: Layout,
    groups: Any,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device,
    sequence_parallel: bool = False,
    recompute: Recompute = Recompute.NONE,
) -> Model:
    """Build this rank's part, its weights not yet set (`runtime.weights.hf`). Collective over the layout's ranks.

    Generation needs `sequence_parallel=False`. `groups` is `GroupCache.collection(layout)`.
    """
    check_runnable(layout)
    if not get_cuda_rng_tracker().states_:  # unused without dropout, but megatron asks for it
        model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
    config = transformer_config(layout, dtype, sequence_parallel and layout.tp > 1, recompute)
    with device:
        chunks = tuple(build_chunk(layout, config, groups, index) for index in range(layout.vpp))
    for chunk in chunks if layout.spec.experts else ():
        lay_out_experts(chunk)
    return Model(layout, config, groups, chunks, device)


def named_shards(model: Model) -> Iterator[tuple[Parameter, nn.Parameter]]:
    """Each parameter as `plans.layout` knows it, with this rank's part, in the order of `Layout.rank_units`.

    The projection of a tied last stage is its copy of the embedding and comes under the embedding's name.
    """
    held = dict(_named_parameters(model))
    units = {unit.name: unit for unit in model_units(model.spec)}
    for name in model.layout.rank_units(torch.distributed.get_rank()):
        for parameter in units[name].parameters:
            yield parameter, held.pop(parameter.name)
    assert not held, f"parameters unknown to the layout: {sorted(held)}"


def nonfinite_parameter(model: Model) -> str:
    """A parameter of which this rank holds a number that is not finite; empty when there is none. Reads every weight
    once and waits for the device once."""
    named = [(parameter.name, held.data) for parameter, held in named_shards(model) if held.numel()]
    if not named or math.isfinite(float(torch.nn.utils.get_total_norm([t for _, t in named], norm_type=math.inf))):
        return ""
    return next((name for name, tensor in named if not tensor.isfinite().all()), "")


def _named_parameters(model: Model) -> Iterator[tuple[str, nn.Parameter]]:
    copy = model.spec.tied_embeddings and not model.first_stage
    experts = model.layout.experts_of(torch.distributed.get_rank())
    for index, chunk in enumerate(model.chunks):
        offset = model.layout.chunk_layers(model.place.pp, index).start
        for name, parameter in chunk.named_parameters():
            yield WORD_EMBEDDINGS if copy and name == OUTPUT else _global_name(name, offset, experts.start), parameter


def _global_name(name: str, layers_before: int, experts_before: int) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + layers_before)
    if "local_experts" in parts:
        at = parts.index("local_experts") + 1
        parts[at] = str(int(parts[at]) + experts_before)
    return ".".join(parts)


def alias_parameters(source: Model, view: Model) -> None:
    """Let `view` use the storage of `source`: one copy of the weights, two configurations (training with sequence
    parallel, generation without). Call after the source's Trainer is made, which moves the weights into its buffers."""
    assert source.layout.same_weights(view.layout)
    for ours, theirs in zip(source.chunks, view.chunks, strict=True):
        weights = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            parameter.data = weights[name].data
            parameter.requires_grad_(False)


def share_base(source: Model, view: Model) -> None:
    """Let `view` use the frozen weights of `source`, or those that `source` has beside its adapters. Both hold the same
    slices of one model (`Layout.same_base`)."""
    theirs = {parameter.name: held for parameter, held in named_shards(source) if not parameter.adapter}
    for parameter, held in named_shards(view):
        if not parameter.adapter:
            held.data = theirs[parameter.name].data


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device; in host memory it is pinned when it comes from a GPU."""
    if tensor.is_cuda and device.type == "cpu":
        return torch.empty_like(tensor, device=device, pin_memory=True).copy_(tensor)
    return tensor.to(device)
