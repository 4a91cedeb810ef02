"""Attempts of a run on one machine: what fails is started again from the newest checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from plans.checkpoint_files import CheckpointError
from plans.plan import ExecutionPlan
from plans.runfile import RunFile
from runtime.checkpoints.resume import Start, choose_start
from runtime.processes.failures import RunFailed, Stopped
from runtime.reports.metrics import Metrics

Attempt = Callable[[Start], Sequence[Metrics]]


def with_restarts(
    plan: ExecutionPlan, run: RunFile, start: Start, attempt: Attempt, asked: Sequence[str]
) -> Sequence[Metrics]:
    """Metrics of the attempt that ends well, of at most 1 + `run.restarts`.

    Raises RunFailed with the cause of the last one; at once where the run was asked to stop (`asked`), and where two
    attempts from the same point fail with the same words: what is wrong then is not an accident.
    """
    begun, seen = start, set[tuple[int, str]]()
    for left in range(run.restarts, -1, -1):
        try:
            return attempt(begun)
        except Stopped:
            raise
        except RunFailed as error:
            failure = (begun.iteration, error.message)
            if not left or asked or failure in seen:
                raise
            seen.add(failure)
            _say(f"{error}\nrestart {run.restarts - left + 1} of {run.restarts}")
            begun = _next_start(plan, run, start, error)
    raise AssertionError("the last attempt returns or raises")


def _next_start(plan: ExecutionPlan, run: RunFile, first: Start, failed: RunFailed) -> Start:
    """The newest checkpoint of this run, or where it began when it has none. Raises the failure where all checkpoints
    are damaged."""
    if not run.checkpoint.every:
        return first
    own = run.model_copy(update={"resume_from": str(run.checkpoint_folder)})
    try:
        found = choose_start(plan, own)
    except CheckpointError as error:
        _say(str(error))
        raise failed from None
    return found if found.checkpoint is not None else first


def _say(text: str) -> None:
    print(text, file=sys.stderr)
