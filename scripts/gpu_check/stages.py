"""The stages, most valuable first, and the process that each runs in."""

from __future__ import annotations

import importlib
import os
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_check.rows import Row, append, append_row, run_cases
from gpu_check.setting import Setting


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: its module with `CASES`, and its time limit in seconds on a card."""

    name: str
    module: str
    limit_s: float


# All limits together stay within eight minutes; the profile takes what the others leave.
STAGES = (
    Stage("right", "gpu_check.right", 120),
    Stage("ceilings", "gpu_check.ceilings", 20),
    Stage("training", "gpu_check.training", 50),
    Stage("decode", "gpu_check.decode", 70),
    Stage("kernels", "gpu_check.kernels", 25),
    Stage("memory", "gpu_check.memory", 60),
    Stage("whole", "gpu_check.whole", 70),
    Stage("profile", "gpu_check.profiles", 360),
)
BY_NAME = {stage.name: stage for stage in STAGES}


def run_stage(name: str, setting: Setting, path: Path, ready: Any, begin: Any, limit_s: float) -> None:
    """The life of a stage's process: import, wait for the turn, run the cases, write every row at once to `path`.

    It leads a process group, so that its ranks can be killed with it.
    """
    os.setsid()
    log = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)  # tracebacks and warnings of its ranks too
    os.dup2(log, 2)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1" if setting.kind == "cpu" else "4")
    try:
        module = importlib.import_module(BY_NAME[name].module)
        ready.set()
        begin.wait()
        append(path, {"machine": _machine(setting)})
        setting = replace(setting, end_s=time.time() + limit_s)
        for row in run_cases(module.CASES, setting):
            append_row(path, row)
        append(path, {"machine": _machine(setting)})  # the clocks right after the work
        append(path, {"done": True})
    except Exception as error:
        traceback.print_exc()
        ready.set()
        append_row(path, Row(case="(start)", verdict="failed", note=f"{type(error).__name__}: {error}"[:600]))


def _machine(setting: Setting) -> dict[str, Any]:
    """Card, driver, clocks and versions."""
    import torch

    from profiler.devices import clocks_mhz, device_name, driver_version, versions

    torch.set_float32_matmul_precision("highest")  # float32 means float32 on both sides of every comparison
    device = setting.device
    return {
        "card": device_name(device),
        "driver": driver_version(device),
        "clocks_mhz": clocks_mhz(device),
        "versions": versions(device),
    }
