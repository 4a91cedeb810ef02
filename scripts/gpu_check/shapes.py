"""Shards of large models on one device: some layers with the sizes that one rank of a tp-way cut has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cost_models.tables.shards import call_spec, shard_spec
from gpu_check.setting import FIXTURE, Setting
from plans.library import load_model
from plans.model import ModelSpec

VOCABULARY = 128
"""Small, so that layers are what is measured."""
SHAPES = {"7B": "llama-7b", "70B": "llama-70b"}


def layers_of(setting: Setting, shape: str, tp: int, layers: int, *, small_vocabulary: bool) -> ModelSpec:
    """Some layers of one rank's shard of a shape; of the fixture model in a rehearsal."""
    whole = load_model(str(FIXTURE)) if setting.tiny else load_model(SHAPES[shape])
    shard = shard_spec(whole, min(tp, 2) if setting.tiny else tp)
    return replace(call_spec(shard, VOCABULARY) if small_vocabulary else shard, layers=min(layers, whole.layers))


def fitting_layers(spec: ModelSpec, bytes_per_parameter: float, setting: Setting) -> ModelSpec:
    """The spec with as many of its layers as three quarters of the free memory hold."""
    import torch

    if setting.kind == "cpu":
        return spec
    free, _ = torch.cuda.mem_get_info()
    while spec.layers > 1 and spec.params * bytes_per_parameter > 0.75 * free:
        spec = replace(spec, layers=spec.layers - 1)
    return spec


@contextmanager
def model_alone(setting: Setting, spec: ModelSpec) -> Iterator[Any]:
    """A model of random weights in a world of one rank; bf16 on a card, fp32 on the CPU. Its memory goes back."""
    import gc

    import torch

    from profiler.alone import alone, single_rank_model

    with alone(setting.device) as groups:
        yield single_rank_model(spec, groups, setting.device, precision(setting))
    gc.collect()
    if setting.kind == "cuda":
        torch.cuda.empty_cache()


def precision(setting: Setting) -> Any:
    """The torch type of weights: bf16 on a card, fp32 on the CPU."""
    import torch

    return torch.bfloat16 if setting.kind == "cuda" else torch.float32
