"""Attempts of a run on one machine: what fails is started again from the newest checkpoint; a run whose numbers went
wrong goes back to one from before that."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from plans.checkpoint_files import CheckpointError
from plans.plan import ExecutionPlan
from plans.runfile import RunFile
from runtime.checkpoints.folder import remove_after
from runtime.checkpoints.resume import Start, choose_start
from runtime.launching.replan import devices_left, replanned
from runtime.reports.endings import Beyond, RunFailed, Stopped
from runtime.reports.metrics import Metrics

Attempt = Callable[[ExecutionPlan, Start], Sequence[Metrics]]


def with_restarts(
    plan: ExecutionPlan,
    run: RunFile,
    start: Start,
    attempt: Attempt,
    asked: Sequence[str],
    left: Callable[[ExecutionPlan], int] = devices_left,
    *,
    choose: Callable[[ExecutionPlan, RunFile], Start] = choose_start,
    forget: Callable[[RunFile, int], None] = remove_after,
    search: Callable[[ExecutionPlan, RunFile, int], ExecutionPlan] = replanned,
) -> Sequence[Metrics]:
    """Metrics of the attempt that ends well, after at most `run.restarts` restarts and `run.rollbacks` rollbacks.

    Raises RunFailed with the cause of the last one; at once where the run was asked to stop (`asked`), and where two
    attempts from the same point fail with the same words. left: the devices of a plan that are still there; where some
    are gone, and `run.on_loss` says so, `search` plans for so many. choose: finds the newest usable checkpoint; forget:
    removes those after an iteration.
    """
    begun, restarts, rollbacks, seen = start, 0, 0, set[tuple[int, str]]()
    while True:
        try:
            return attempt(plan, begun)
        except RunFailed as error:
            stopped = asked or isinstance(error, Stopped)
            bad, failure = _bad_iteration(run, error), (begun.iteration, error.message)
            if stopped or (rollbacks >= run.rollbacks if bad is not None else restarts >= run.restarts):
                raise
            if bad is not None:
                rollbacks += 1
                _say(f"{error}\nrollback {rollbacks} of {run.rollbacks}")
                forget(run, max(_newest_good(error, bad), start.iteration))
                begun = _before(_next_start(plan, run, start, error, choose), run, begun, bad)
                continue
            if failure in seen:
                raise
            seen, restarts = seen | {failure}, restarts + 1
            _say(f"{error}\nrestart {restarts} of {run.restarts}")
            plan = _plan_left(plan, run, left(plan), error, search)
            found = _next_start(plan, run, start, error, choose)
            begun = replace(found, skip_batches=max(found.skip_batches, begun.skip_batches))


def _plan_left(
    plan: ExecutionPlan,
    run: RunFile,
    devices: int,
    failed: RunFailed,
    search: Callable[[ExecutionPlan, RunFile, int], ExecutionPlan],
) -> ExecutionPlan:
    """The plan to go on with: the same one where all its devices are there."""
    if devices >= plan.cluster.size:
        return plan
    _say(f"{devices} of {plan.cluster.size} devices are left")
    if run.on_loss == "stop":
        hint = "on_loss=replan plans for what is left; `realplan search --measured OUTPUT --gpus N` does it by hand"
        raise RunFailed(f"{failed.message}\n{devices} of {plan.cluster.size} devices are left", hint) from None
    found = search(plan, run, devices)
    seconds = f", {found.estimate.iteration_s:.4g} s an iteration" if found.estimate else ""
    _say(f"going on with a plan for {found.cluster.size} devices{seconds}")
    return found


def _bad_iteration(run: RunFile, error: RunFailed) -> int | None:
    """The iteration that a run goes back from; None where that does not help."""
    if isinstance(error, Beyond):
        return error.iteration
    return error.nonfinite if run.on_nonfinite == "rollback" else None


def _newest_good(failed: RunFailed, bad: int) -> int:
    """The last iteration whose state is from before an iteration went wrong. A KL is measured before an iteration
    trains: the state at its beginning is already beyond."""
    return bad - 1 if isinstance(failed, Beyond) else bad


def _before(found: Start, run: RunFile, begun: Start, bad: int) -> Start:
    """A state from before an iteration went wrong, with the data after the batch of that iteration: the same state and
    the same data would give the same numbers, so the batches since that state are left out with it."""
    skip = bad + 1 + max(begun.skip_batches, run.skip_batches) - found.iteration
    _say(f"going back to iteration {found.iteration}; batches of the data left out so far: {skip}")
    return replace(found, skip_batches=skip)


def _next_start(
    plan: ExecutionPlan,
    run: RunFile,
    first: Start,
    failed: RunFailed,
    choose: Callable[[ExecutionPlan, RunFile], Start],
) -> Start:
    """The newest checkpoint of this run, or where it began when it has none. Raises the failure where all checkpoints
    are damaged."""
    if not run.checkpoint.every:
        return first
    own = run.model_copy(update={"resume_from": str(run.checkpoint_folder)})
    try:
        found = choose(plan, own)
    except CheckpointError as error:
        _say(str(error))
        raise failed from None
    return found if found.checkpoint is not None else first


def _say(text: str) -> None:
    print(text, file=sys.stderr)
