"""Published measurements as cases that the cost models can cost: one row of a measurements file becomes a model, a
cluster and an engine (`row_layouts`: and a layout).

A row that lacks what a prediction needs, or runs on hardware or in a precision outside the catalogue, raises
`Unpredictable` with the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from cost_models.engines.engine import Engine
from cost_models.engines.machine import Machine
from cost_models.validation.row_schema import is_number
from plans.cluster import ClusterSpec
from plans.documents import BadText, locate, parse_json, read_text, refuse
from plans.errors import SpecError
from plans.library import load_cluster, load_model, model_names
from plans.model import ModelSpec, Norm, Position
from plans.problems import Path_, Problem, shortened
from plans.workload import DTYPE_BYTES

Row = Mapping[str, Any]

GPU_NAMES = {
    "A100-40GB-SXM": "a100-40gb",
    "A100-80GB-SXM": "a100-80gb",
    "A100-80GB(330W, hybrid cube mesh)": "a100-80gb",
    "H100-80GB-SXM": "h100-80gb-sxm",
    "H200-141GB-SXM": "h200-141gb",
    "B200-180GB-SXM": "b200-180gb",
    "B300": "b300-288gb",
    "L40S": "l40s",
    "RTX-4090": "rtx-4090",
}
"""How the rows name the catalogue's GPUs."""

TRAIN_ENGINES = {
    ("megatron", "flash"): "megatron-te",
    ("megatron", "unfused"): "megatron-unfused",
    ("megatron-deepspeed", "flash"): "megatron-deepspeed",
    ("megatron-deepspeed", "unfused"): "megatron-deepspeed",
    ("fsdp", "flash"): "fsdp",
}
HOST_ENGINES = {"eager": "eager", "graphs": "cuda-graphs", "native": "native"}
PPO_GPU = "a100-80gb"
"""The reading of "8-GPU nodes, 80 GB, A100-class" of the published PPO iterations, which state no GPU."""
_FIGURE = r"\d+(?:,\d{3})*(?:\.\d+)?"
_NETWORK = re.compile(rf"(?<![\w.,/-])((?:{_FIGURE} ?[x×] ?)*{_FIGURE}) Gb/s per node")
"""The network that notes state, "800 Gb/s per node" or "8x200 Gb/s per node", never a part of another number."""


class Unpredictable(Exception):
    """Why a row cannot be predicted."""


def library_files() -> list[Path]:
    """The measurement files that the package carries."""
    folder = Path(str(files("cost_models"))) / "library" / "measurements"
    return sorted(folder.glob("*.json"))


def read_rows(path: Path) -> list[Row]:
    """Rows of a measurements file: `{"rows": [{"id", "measured", ...}]}` or a bare list of rows (`row_schema`)."""
    text = read_text(path, SpecError, "measurements", FORM, MOST_BYTES)
    try:
        document = parse_json(text)
    except BadText as error:
        refuse(SpecError, path, [error.problem])
    rows = document.get("rows") if isinstance(document, dict) else document
    if not isinstance(rows, list):
        refuse(SpecError, path, locate(text, [Problem("rows", "there is no list of rows", FORM, ("rows",))]))
    at: Path_ = ("rows",) if isinstance(document, dict) else ()
    problems = [found for i, row in enumerate(rows) if (found := _row_fault(row, (*at, i)))]
    return refuse(SpecError, path, locate(text, problems)) if problems else rows


MOST_BYTES = 64 * 2**20
FORM = 'the form is {"rows": [{"id": ..., "measured": {...}, ...}, ...]}'


def _row_fault(row: Any, path: Path_) -> Problem | None:
    """What keeps a row from being one at all; the rest makes it unpredictable at worst."""
    if not isinstance(row, dict):
        return Problem("row", f"{type(row).__name__} where an object must stand", FORM, path)
    for key in ("id", "measured"):
        if key not in row:
            return Problem("row", f"there is no `{key}`", FORM, path)
    if not isinstance(row["id"], str) or not row["id"]:
        rule = f"id: {shortened(row['id'])} must be a text that is not empty"
        return Problem("row", rule, '"id": "a-name"', (*path, "id"))
    if not isinstance(row["measured"], dict):
        rule = f"{shortened(row['id'])}: measured: {type(row['measured']).__name__} where an object must stand"
        return Problem("row", rule, '{"step_time_s": 1.5}', (*path, "measured"))
    return None


def number(row: Row, key: str) -> float:
    """A positive number of the row."""
    value = row.get(key)
    if value is None:
        raise Unpredictable(f"{key} is not published")
    if not is_number(value) or not value > 0:
        raise Unpredictable(f"{key} is {value!r}; it must be a positive number")
    return float(value)


def whole(row: Row, key: str, default: int | None = None) -> int:
    """A positive whole number of the row, or the default where it is not published."""
    if row.get(key) is None and default is not None:
        return default
    value = number(row, key)
    if value != int(value):
        raise Unpredictable(f"{key} is {value}; it must be a whole number")
    return int(value)


def row_spec(row: Row) -> ModelSpec:
    """The architecture of a row; of a row that only names its model, the library's."""
    arch = row.get("arch") or {}
    if not arch and row.get("model") in model_names():
        return load_model(str(row["model"]))
    missing = [key for key in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab") if not arch.get(key)]
    if missing:
        raise Unpredictable(f"architecture without {', '.join(missing)}")
    gated = bool(arch.get("gated_mlp"))
    experts = int(arch.get("experts") or 0)
    return ModelSpec(
        name=str(row.get("model", row["id"])),
        layers=int(arch["layers"]),
        hidden=int(arch["hidden"]),
        heads=int(arch["heads"]),
        kv_heads=int(arch["kv_heads"]),
        head_dim=int(arch.get("head_dim") or arch["hidden"] // arch["heads"]),
        ffn=int((experts and arch.get("moe_ffn")) or arch["ffn"]),
        vocab=int(arch["vocab"]),
        gated_mlp=gated,
        tied_embeddings=bool(arch.get("tied")),
        norm=Norm.RMS if gated else Norm.LAYER,
        position=Position.ROPE,
        linear_bias=not gated,
        experts=experts,
        experts_per_token=int(arch.get("topk") or 0),
        shared_ffn=int(arch.get("shared_ffn") or 0),
    )


def row_cluster(row: Row) -> ClusterSpec:
    """The cluster of a row: the catalogue's, with the network that the row states ("800 Gb/s per node")."""
    name = str(row.get("gpu"))
    if name not in GPU_NAMES and name not in GPU_NAMES.values():
        raise Unpredictable(f"gpu is `{name}`, which is not in the catalogue (`realplan clusters`)")
    gpus, per_node = row_gpus(row), whole(row, "gpus_per_node", 8)
    per_node = min(per_node, gpus)
    cluster = load_cluster(GPU_NAMES.get(name, name), gpus=-(-gpus // per_node) * per_node, gpus_per_node=per_node)
    stated = _NETWORK.search(str(row.get("notes") or ""))
    if not stated:
        return cluster
    gigabits = math.prod(float(figure.replace(",", "")) for figure in re.findall(_FIGURE, stated[1]))
    return ClusterSpec(
        nodes=cluster.nodes,
        gpus_per_node=cluster.gpus_per_node,
        gpu=cluster.gpu,
        inter_node_gbps=gigabits / 8 / per_node,
        host_memory_gib=cluster.host_memory_gib,
    )


def ppo_cluster(row: Row) -> ClusterSpec:
    """The cluster of a PPO iteration: on the GPU that the row states, or on PPO_GPU where it states none."""
    return row_cluster({**row, "gpu": PPO_GPU} if row.get("gpu") is None else row)


def row_gpus(row: Row) -> int:
    """All GPUs of a row: as published, or the product of its degrees."""
    if row.get("gpus") is None and row.get("dp") is None:
        raise Unpredictable("gpus is not published")
    product = whole(row, "tp", 1) * whole(row, "pp", 1) * whole(row, "cp", 1) * whole(row, "dp", 1)
    return whole(row, "gpus", product)


def row_dtype(row: Row) -> str:
    """The precision of a row."""
    precision = row.get("precision")
    if precision is None:
        raise Unpredictable("precision is not published")
    if precision not in DTYPE_BYTES:
        raise Unpredictable(f"precision `{precision}` is not modelled")
    return str(precision)


def train_engine_name(row: Row) -> str:
    """The engine of a training row."""
    key = (str(row.get("engine") or "megatron"), str(row.get("attention") or "flash"))
    if key not in TRAIN_ENGINES:
        raise Unpredictable(f"engine `{key[0]}` with {key[1]} attention is not modelled")
    return TRAIN_ENGINES[key]


def inference_engine_name(row: Row) -> str:
    """The engine of an inference row: by its host, TensorRT-LLM and TurboMind by name."""
    if (row.get("mode") or "static") != "static":
        raise Unpredictable("continuous batching at maximal load: queueing is not modelled")
    if str(row.get("engine")).startswith("TensorRT-LLM"):
        return "trt-llm"
    if "TurboMind" in str(row.get("engine")):
        return "turbomind"
    host = str(row.get("host") or "eager")
    if host not in HOST_ENGINES:
        raise Unpredictable(f"host `{host}` (serving stack in the path) is not modelled")
    return HOST_ENGINES[host]


def row_machine(row: Row, engine: Engine) -> Machine:
    """The cluster of a row as an engine uses it in the row's precision."""
    return engine.on(row_cluster(row), row_dtype(row))
