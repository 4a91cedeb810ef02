"""Named architectures and hardware that ship with the package; every file here is data."""

from __future__ import annotations

import json
import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from plans.cluster import ClusterSpec, GpuSpec
from plans.errors import SpecError, nearest
from plans.model import ModelSpec
from plans.rope import scaling_of


@cache
def _read(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(files("plans.library").joinpath(name).read_text("utf-8"))
    return data


def model_names() -> list[str]:
    """Every named architecture, aliases first."""
    data = _read("models.json")
    return [*data["aliases"], *data["models"]]


def load_model(name: str) -> ModelSpec:
    """A named architecture (`llama-70b`), or the one of a folder that holds a Hugging Face `config.json`."""
    data = _read("models.json")
    key = data["aliases"].get(name, name)
    if key in data["models"]:
        fields = {k: v for k, v in data["models"][key].items() if k not in ("params_b", "source")}
        scaling = fields.pop("rope_scaling", None)
        return ModelSpec(name=key, rope_scaling=scaling_of(scaling) if scaling else None, **fields)
    path = Path(name)
    if os.path.exists(path):
        from plans.huggingface import spec_from_folder  # its families take a while to load

        return spec_from_folder(path)
    raise SpecError(
        f"unknown model `{name}`",
        f"{nearest(name, model_names())} (`realplan models` lists all; a folder with a config.json also works)",
    )


def gpu_names() -> list[str]:
    """Every GPU kind."""
    return list(_read("hardware.json")["gpus"])


def load_gpu(name: str) -> GpuSpec:
    """A GPU kind by name."""
    gpus = _read("hardware.json")["gpus"]
    if name not in gpus:
        raise SpecError(f"unknown GPU `{name}`", nearest(name, list(gpus)))
    return GpuSpec(name=name, **{key: float(value) for key, value in gpus[name].items()})


def cluster_names() -> list[str]:
    """Every named cluster."""
    return list(_read("hardware.json")["clusters"])


def load_cluster(name: str, *, gpus: int | None = None, gpus_per_node: int | None = None) -> ClusterSpec:
    """A cluster of `gpus` GPUs of the named kind (default: one node)."""
    clusters = _read("hardware.json")["clusters"]
    if name not in clusters:
        raise SpecError(f"unknown cluster `{name}`", f"{nearest(name, list(clusters))} (`realplan clusters` lists all)")
    entry = dict(clusters[name])
    per_node = gpus_per_node or int(entry.pop("gpus_per_node"))
    entry.pop("gpus_per_node", None)
    total = gpus or per_node
    if total < 1:
        raise SpecError(f"cluster: {total} GPUs; it must be at least 1")
    if total < per_node:
        per_node = total
    if total % per_node:
        raise SpecError(
            f"cluster: {total} GPUs do not fill nodes of {per_node}",
            f"{total // per_node * per_node} or {(total // per_node + 1) * per_node} GPUs",
        )
    gpu = load_gpu(entry.pop("gpu"))
    speeds = {key: float(value) for key, value in entry.items()}
    return ClusterSpec(nodes=total // per_node, gpus_per_node=per_node, gpu=gpu, **speeds)
