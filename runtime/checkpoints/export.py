"""Hugging Face folders out of a checkpoint, on any machine: no rank, no plan and no GPU is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from plans.checkpoint import Entry
from plans.checkpoint_files import MASTER, Checkpoint, CheckpointError, find_whole, verify_files
from plans.files import check_target
from plans.layout import Parameter, model_units
from plans.model import ModelSpec
from plans.runfile import RANDOM, weights_of
from runtime.checkpoints.held import HELD
from runtime.checkpoints.read import CheckpointReader
from runtime.checkpoints.resume import run_of
from runtime.weights.hf import random_parameter, whole_parameter
from runtime.weights.hf_files import WeightFiles
from runtime.weights.hf_folder import write_folder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export_checkpoint(place: Path, folder: Path, role: str = "", dtype: str = "", weights: str = "") -> Checkpoint:
    """Write the weights of a trained role (default: the first one) as a Hugging Face folder, adapters merged and beside
    it (`runtime.weights.hf_folder`); the checkpoint used.

    place: a checkpoint, a folder of them or the output of a run, whose newest whole one is taken. dtype: bf16, fp16 or
    fp32; default: that of the plan which wrote it. weights: where those of the run lie now. What `folder` held goes
    to `NAME.1`. Raises RealplanError.
    """
    checkpoint = find_whole(place)
    roles = list(checkpoint.plan.workload.graph.trainers)
    if role and role not in roles:
        raise CheckpointError(f"checkpoint `{checkpoint.folder}` has no `{role}`", f"one of {', '.join(roles)}")
    role = role or roles[0]
    check_target(folder / "config.json")
    if not os.path.isfile(checkpoint.folder / HELD):  # else what is there was checked as it came, and the rest is holes
        verify_files(checkpoint)
    spec = checkpoint.plan.workload.models[role]
    wanted = DTYPES[dtype or checkpoint.plan.workload.dtype]
    run = run_of(checkpoint)
    named = weights or weights_of(run.get("weights", ""), role)
    source = Path(named) if named and os.path.isdir(named) else None
    base = _base(spec, named, source, int(run.get("seed", 0))) if spec.lora else None
    write_folder(spec, wanted, _parameters(checkpoint, role, wanted, base), folder, source)
    return checkpoint


def _parameters(
    checkpoint: Checkpoint, role: str, dtype: torch.dtype, base: Callable[[Parameter], Tensor] | None
) -> Iterator[tuple[Parameter, Tensor]]:
    """Whole parameters in the order of `model_units`: trained ones from the checkpoint, others from `base`."""
    with CheckpointReader(checkpoint, role) as reader:
        for unit in model_units(checkpoint.plan.workload.models[role]):
            for parameter in unit.parameters:
                if parameter.frozen:
                    assert base is not None
                    whole = base(parameter)
                else:
                    whole = reader.read(Entry(parameter.name, 0, 1, 0, parameter.size), MASTER)
                yield parameter, whole.view(parameter.shape).to(dtype)


def _base(spec: ModelSpec, named: str, source: Path | None, seed: int) -> Callable[[Parameter], Tensor]:
    """What gives the frozen parameters of a model with adapters: the weights that its run began with."""
    if named == RANDOM:
        return lambda parameter: random_parameter(spec, parameter, seed)
    if source is None:
        message = f"the weights `{named}`, beside which the adapters were trained, are not there"
        raise CheckpointError(message, "put the folder back to its place: a checkpoint holds adapters alone")
    files = WeightFiles(source)
    files.check(spec)
    return lambda parameter: whole_parameter(files, spec, parameter)
