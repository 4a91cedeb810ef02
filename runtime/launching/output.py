"""The output folder of a run: whose it is, what an earlier run left in it, and what must not be lost."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from plans.codec import dump_plan, save_plan
from plans.files import OutputError, check_target, free_name, write_atomically
from plans.plan import ExecutionPlan
from plans.run_output import (
    BEST,
    EVALUATIONS,
    METRICS,
    PAGE,
    PLAN,
    RUN,
    SAMPLES,
    TIMELINE,
    adapter_of,
    partial_of,
    replaced_of,
)
from plans.runfile import CHECKPOINTS, RANDOM, RunFile
from runtime.reports.trackers import EVENTS


def exported_role(plan: ExecutionPlan) -> str:
    """The trained role that a run exports."""
    return next(iter(plan.workload.graph.trainers))


def check_output(plan: ExecutionPlan, run: RunFile) -> None:
    """Raise RealplanError where a run could not write its output, or would take away what is not its own."""
    output = Path(run.output)
    if os.path.lexists(output) and not os.path.isdir(output):
        raise OutputError(f"cannot write to output `{output}`: it is no folder", "output=FOLDER")
    check_target(output / ".check")
    _check_weights(plan, run, output / exported_role(plan), "export=false" if run.export else "")
    _check_weights(plan, run, output / BEST, "evaluation.keep_best=false" if run.evaluation.keep_best else "")


def _check_weights(plan: ExecutionPlan, run: RunFile, weights: Path, without: str) -> None:
    """What `check_output` says of a folder of weights. without: the key that keeps this run from writing one."""
    if not os.path.lexists(weights):
        return
    if not _is_of_a_run(weights.parent):
        if not without:
            return
        raise OutputError(
            f"output `{weights.parent}` holds `{weights.name}`, which no run has written and this run would replace",
            f"output=FOLDER, a new one, or {without}",
        )
    for key, path in _inputs(plan, run):
        if Path(path).resolve().is_relative_to(weights.resolve()):
            raise OutputError(
                f"{key} `{path}` lies in the output of the run, which would move it away", "output=FOLDER, another one"
            )


@contextmanager
def held_output(plan: ExecutionPlan, run: RunFile, *, goes_on: bool = False) -> Iterator[Path | None]:
    """Hold the output folder, with the plan and the run file as they are run in it.

    Gives where the output of an earlier run has gone (`NAME.1`, or the next number that is free), None without one, or
    where that run goes on.
    """
    check_output(plan, run)
    output = Path(run.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(f"cannot write to output `{output}`: {error.strerror}", "output=FOLDER") from None
    try:
        _lock(descriptor, output)
        moved = None if goes_on else _set_aside(plan, output)
        keep_plan(plan, output)
        save_run(run)
        yield moved
    finally:
        for weights in (exported_role(plan), BEST):
            for made in (weights, adapter_of(weights)):
                for left in (partial_of(made), replaced_of(made)):
                    shutil.rmtree(output / left, ignore_errors=True)
        os.close(descriptor)


def keep_plan(plan: ExecutionPlan, output: Path) -> None:
    """Keep the plan, as it is run, in the output."""
    if not _holds(output / PLAN, plan):
        save_plan(plan, output / PLAN)


def save_run(run: RunFile) -> None:
    """Keep the run file, as it is run, in the output."""
    text = yaml.safe_dump(run.model_dump(mode="json", exclude={"resume_from"}), sort_keys=False)
    write_atomically(Path(run.output) / RUN, text)


def _lock(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"output `{output}` is being written by another run", "output=FOLDER, another one") from None
    except OSError:  # a network file system without locks on folders
        return


def _is_of_a_run(output: Path) -> bool:
    return all(os.path.isfile(output / name) for name in (PLAN, RUN, METRICS))


def _set_aside(plan: ExecutionPlan, output: Path) -> Path | None:
    """Move what a run writes out of its way. The plan and the run file are copied: other ranks may be reading them."""
    role = exported_role(plan)
    weights = (name for made in (role, BEST) for name in (made, adapter_of(made)))
    if _is_of_a_run(output) and not (output / METRICS).stat().st_size and not os.path.lexists(output / role):
        return None  # it failed before its first iteration
    moving = [
        METRICS,
        TIMELINE,
        SAMPLES,
        EVALUATIONS,
        PAGE,
        *([*weights, CHECKPOINTS, EVENTS] if _is_of_a_run(output) else []),
    ]
    moving = [name for name in moving if os.path.lexists(output / name)]
    copied = [name for name in (PLAN, RUN) if os.path.isfile(output / name)]
    if not moving and (not copied or _holds(output / PLAN, plan)) and RUN not in copied:
        return None
    place = free_name(output.resolve())
    try:
        place.mkdir()
        for name in copied:
            shutil.copy2(output / name, place)
        for name in moving:
            shutil.move(output / name, place / name)
    except OSError as error:
        raise OutputError(
            f"cannot move the output of an earlier run to `{place}`: {error.strerror}", "output=FOLDER, another one"
        ) from None
    return place


def _holds(path: Path, plan: ExecutionPlan) -> bool:
    try:
        return path.read_text(encoding="utf-8") == dump_plan(plan)
    except (OSError, UnicodeDecodeError):
        return False


def _inputs(plan: ExecutionPlan, run: RunFile) -> Iterator[tuple[str, str]]:
    for role in plan.workload.graph.roles:
        if run.weights_of(role) not in ("", RANDOM):
            yield f"weights of `{role}`", run.weights_of(role)
    named = [("tokenizer", run.tokenizer), *(("reward", name.rpartition(":")[0]) for name in run.rewards)]
    named += [("evaluation.source", run.evaluation.source)]
    for key, place in [*named, *(("data.source", part.path) for part in run.data.parts)]:
        if place and os.path.exists(place):
            yield key, place
