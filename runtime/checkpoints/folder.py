"""The folder of a run's checkpoints: names, and what is left over of earlier attempts. Light: no torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from plans.checkpoint_files import step_folder, steps_in
from plans.errors import RealplanError
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


def prepare_folder(run: RunFile) -> None:
    """Have the folder of checkpoints, without what earlier attempts have left half done.

    Raises RealplanError where it cannot be written, and where a run that starts anew would mix its checkpoints with
    those of another.
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
    except OSError as error:
        raise RealplanError(
            f"cannot write checkpoints to `{folder}`: {error.strerror}", "checkpoint.folder=FOLDER"
        ) from None


def remove_after(run: RunFile, iteration: int) -> None:
    """Remove the checkpoints of a run after so many iterations: their state is one that it must not go on from."""
    for path in steps_in(run.checkpoint_folder):
        if int(path.name.rpartition("_")[2]) > iteration:
            aside = path.with_name(f".{path.name}.old")
            path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
