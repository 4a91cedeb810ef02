"""The folder of a run's checkpoints: names, room, what is left over of earlier attempts. Light: no torch."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

from plans.algorithms import REFERENCE
from plans.checkpoint import parameters_of
from plans.checkpoint_files import MASTER_BYTES, STATE_BYTES, step_folder, steps_in
from plans.errors import RealplanError
from plans.plan import ExecutionPlan
from plans.runfile import RunFile

RANK_WORDS = ".rank-*.json"


def partial_folder(folder: Path, iteration: int) -> Path:
    """Where a checkpoint stands before it is whole."""
    return folder / f".{step_folder(folder, iteration).name}.partial"


def rank_word(rank: int) -> str:
    """Name of the file in which a rank says that its part is on the disk."""
    return f".rank-{rank:05d}.json"


def rank_file(rank: int) -> str:
    """Name of a rank's tensors in a checkpoint."""
    return f"rank-{rank:05d}.safetensors"


def stop_request(scratch: Path) -> Path:
    """The file by which a launcher asks its ranks to stop."""
    return scratch / "stop"


def checkpoint_bytes(plan: ExecutionPlan, run: RunFile) -> int:
    """Bytes of one checkpoint of a run: the state of trained roles, and the weights of a reference that follows."""
    sizes = dict.fromkeys(plan.workload.graph.trainers, STATE_BYTES)
    if run.reference.every:
        sizes[REFERENCE] = MASTER_BYTES
    models = plan.workload.models
    return sum(each * p.size for role, each in sizes.items() for p in parameters_of(models[role]).values())


def prepare_folder(plan: ExecutionPlan, run: RunFile, part: float = 1.0) -> None:
    """Clear what earlier attempts left half done, and see that there is room. part: of a checkpoint, that comes to lie
    in this folder; the copies in host memory are those of the ranks of one node.

    Raises RealplanError where a run that starts anew would mix its checkpoints with those of another, and where disk or
    host memory are too small.
    """
    if not run.checkpoint.every:
        return
    folder = run.checkpoint_folder
    there = steps_in(folder)
    if there and not run.resume_from:
        raise RealplanError(
            f"`{folder}` holds checkpoints of another run, such as `{there[0].name}`",
            "--resume goes on from the newest; checkpoint.folder=FOLDER, another one, starts anew",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".global_step_*"):
            shutil.rmtree(path)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise RealplanError(
            f"cannot write checkpoints to `{folder}`: {error.strerror}", "checkpoint.folder=FOLDER"
        ) from None
    whole = checkpoint_bytes(plan, run)
    size, copies = math.ceil(whole * part), whole // plan.cluster.nodes
    # One more than is kept stands there while the oldest waits to be removed.
    need = size * max(run.checkpoint.keep + 1 - len(there), 1)
    if free < need:
        raise RealplanError(
            f"checkpoints need {need / 2**30:.1f} GiB in `{folder}`, where {free / 2**30:.1f} GiB are free",
            "checkpoint.folder=FOLDER on another disk, a smaller checkpoint.keep, or checkpoint.every=0 for none",
        )
    memory = _available_memory()
    if memory is not None and memory < copies:
        raise RealplanError(
            f"checkpoints need {copies / 2**30:.1f} GiB of host memory, and {memory / 2**30:.1f} GiB are available",
            "checkpoint.every=0 for no checkpoints",
        )


def remove_after(run: RunFile, iteration: int) -> None:
    """Remove the checkpoints of a run after so many iterations: their state is one that it must not go on from."""
    for path in steps_in(run.checkpoint_folder):
        if int(path.name.rpartition("_")[2]) > iteration:
            aside = path.with_name(f".{path.name}.old")
            path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


def _available_memory() -> int | None:
    """Bytes of host memory that can still be used; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.split()[1].isdigit()}
    return kib["MemAvailable"] * 1024 if "MemAvailable" in kib else None


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
