"""Where a run begins: at its first iteration, or after the newest checkpoint that its plan can take up. No torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from plans.checkpoint_files import Checkpoint, CheckpointError, find_usable
from plans.plan import ExecutionPlan
from plans.run_output import METRICS, RUN
from plans.runfile import RunFile

_FREE = (
    "output", "export", "timeout_s", "iterations", "checkpoint", "restarts", "samples", "resume_from", "workload",
    "on_loss", "on_nonfinite", "kl_bound", "rollbacks", "skip_batches",
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """The beginning of a run: iterations done, the checkpoint that has their state, their lines of metrics. `own`: the
    checkpoint is one of the run's own, so that its output goes on. skip_batches: of the data, left out so far."""

    iteration: int = 0
    checkpoint: Path | None = None
    metrics: str = ""
    own: bool = False
    skip_batches: int = 0

    @property
    def lines(self) -> list[dict[str, float]]:
        """Metrics of the iterations done."""
        nan = float("nan")
        lines = [json.loads(line) for line in self.metrics.splitlines()]
        return [{name: nan if value is None else value for name, value in line.items()} for line in lines]

    def of(self, run: RunFile) -> RunFile:
        """The run file as ranks get it: `resume_from` is the checkpoint itself, and the data go on where it stopped."""
        skip = max(run.skip_batches, self.skip_batches)
        return run.model_copy(update={"resume_from": str(self.checkpoint or ""), "skip_batches": skip})


def choose_start(plan: ExecutionPlan, run: RunFile) -> Start:
    """The start that `resume_from` asks for; says which checkpoints were refused, and what the run file has changed.

    Raises CheckpointError where none can be used, or the run is over before it.
    """
    if not run.resume_from:
        return Start()
    checkpoint = _choose(plan, run)
    return Start(own=True) if checkpoint is None else start_from(checkpoint, checkpoint.folder, run)


def start_from(checkpoint: Checkpoint, named: Path, run: RunFile) -> Start:
    """The start after a checkpoint that can be used, which is known as `named`; says what the run file has changed.
    Raises CheckpointError where the run is over before it."""
    done = checkpoint.index.iteration
    if done > run.iterations:
        raise CheckpointError(
            f"checkpoint `{named}` has {done} iterations, the run {run.iterations}",
            f"iterations={done + 10}",
        )
    _say(f"going on from {named}: {done} of {run.iterations} iterations are done")
    for change in _changes(checkpoint, run):
        _say(f"  other than in the checkpoint: {change}")
    metrics = (checkpoint.folder / METRICS).read_text(encoding="utf-8")
    own = named.resolve().parent == run.checkpoint_folder.resolve()
    skipped = int(run_of(checkpoint).get("skip_batches", 0))
    return Start(done, named.resolve(), metrics, own, skipped)


def _choose(plan: ExecutionPlan, run: RunFile) -> Checkpoint | None:
    place = Path(run.resume_from)
    found, refusals = find_usable(place, plan)
    for refusal in refusals:
        _say(f"{refusal}; the one before is used")
    if found is None:
        if place != run.checkpoint_folder:
            hint = "resume_from=FOLDER, a checkpoint or the output of a run"
            raise CheckpointError(f"no checkpoint in `{place}`", hint)
        _say(f"no checkpoint in {place} yet: starting at the first iteration")
    return found


def _changes(checkpoint: Checkpoint, run: RunFile) -> Iterator[str]:
    """Keys of the run file that have another value than when the checkpoint was written."""
    then = dict(_flat(run_of(checkpoint)))
    for key, value in _flat(run.model_dump(mode="json")):
        if key.split(".")[0] not in _FREE and key in then and then[key] != value:
            yield f"{key} was {then[key]}, is {value}"


def run_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The run file of a checkpoint as it stands, whatever version wrote it."""
    found: dict[str, Any] = yaml.safe_load((checkpoint.folder / RUN).read_text(encoding="utf-8"))
    return found


def _flat(data: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _flat(value, f"{at}.{key}" if at else str(key))
    else:
        yield at, data


def _say(text: str) -> None:
    print(text, file=sys.stderr)
