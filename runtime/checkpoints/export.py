"""Hugging Face folders out of a checkpoint, on any machine: no rank, no plan and no GPU is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from torch import Tensor

from plans.checkpoint import Entry
from plans.checkpoint_files import MASTER, Checkpoint, CheckpointError, find_whole, verify_files
from plans.files import check_target
from plans.layout import Parameter, model_units
from plans.run_output import RUN
from runtime.checkpoints.read import CheckpointReader
from runtime.weights.export import write_folder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export_checkpoint(place: Path, folder: Path, role: str = "", dtype: str = "") -> Checkpoint:
    """Write the weights of a trained role (default: the first one) as a Hugging Face folder; the checkpoint used.

    place: a checkpoint, a folder of them or the output of a run, whose newest whole one is taken. dtype: bf16, fp16 or
    fp32; default: that of the plan which wrote it. What `folder` held goes to `NAME.1`. Raises RealplanError.
    """
    checkpoint = find_whole(place)
    roles = list(checkpoint.plan.workload.graph.trainers)
    if role and role not in roles:
        raise CheckpointError(f"checkpoint `{checkpoint.folder}` has no `{role}`", f"one of {', '.join(roles)}")
    role = role or roles[0]
    check_target(folder / "config.json")
    verify_files(checkpoint)
    spec = checkpoint.plan.workload.models[role]
    wanted = DTYPES[dtype or checkpoint.plan.workload.dtype]
    write_folder(spec, wanted, _parameters(checkpoint, role, wanted), folder, _source(checkpoint, role))
    return checkpoint


def _parameters(checkpoint: Checkpoint, role: str, dtype: torch.dtype) -> Iterator[tuple[Parameter, Tensor]]:
    with CheckpointReader(checkpoint, role) as reader:
        for unit in model_units(checkpoint.plan.workload.models[role]):
            for parameter in unit.parameters:
                whole = reader.read(Entry(parameter.name, 0, 1, 0, parameter.size), MASTER)
                yield parameter, whole.view(parameter.shape).to(dtype)


def _source(checkpoint: Checkpoint, role: str) -> Path | None:
    """The folder that the run read the role's weights from, if it is still there: the tokenizer comes from it."""
    run = yaml.safe_load((checkpoint.folder / RUN).read_text(encoding="utf-8"))
    weights = run.get("weights", "")
    named = weights if isinstance(weights, str) else weights.get(role) or weights.get("actor", "")
    return Path(named) if named and os.path.isdir(Path(named)) else None
