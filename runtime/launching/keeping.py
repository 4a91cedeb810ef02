"""What the process that keeps the files of a run does around its attempts: output, metrics, checkpoints, signals."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

from plans.plan import ExecutionPlan
from plans.runfile import RunFile, patience_s
from runtime.checkpoints.folder import prepare_folder, stop_request
from runtime.checkpoints.resume import Start
from runtime.checkpoints.room import check_disks, check_memory
from runtime.launching.output import held_output, keep_plan, save_run
from runtime.processes.lifetime import STOP_SIGNALS
from runtime.reports.endings import Stopped
from runtime.reports.metrics import Metrics
from runtime.reports.monitor import Monitor
from runtime.reports.trackers import Trackers
from runtime.reports.watchdog import Watchdog


@contextmanager
def own_output(plan: ExecutionPlan, run: RunFile, start: Start) -> Iterator[None]:
    """Hold the output folder for all attempts of a run."""
    with held_output(plan, run, goes_on=start.own) as earlier:
        if earlier is not None:
            print(f"the output of an earlier run is now in {earlier}", file=sys.stderr)
        yield


@contextmanager
def kept_files(
    plan: ExecutionPlan,
    run: RunFile,
    start: Start,
    scratch: Path,
    completer: AbstractContextManager[object],
    ranks: Sequence[int] | None = None,
    keeps: Sequence[int] | None = None,
) -> Iterator[Monitor]:
    """The files of an attempt, kept while its ranks run: what ranks say, metrics and checkpoints, which `completer`
    makes whole. ranks: those that run on this machine; keeps: those whose parts of checkpoints come to lie here (None:
    all)."""
    with _scratch(scratch):
        prepare_folder(run)
        check_disks(plan, run, keeps, exports=True)
        check_memory(plan, run, ranks)
        save_run(start.of(run))
        keep_plan(plan, Path(run.output))
        # The monitor leaves first: the last checkpoint waits for the last line of metrics.
        with (
            completer,
            closing(Trackers(plan, run)) as trackers,
            Monitor(
                plan, run.iterations, scratch, Path(run.output), start.lines,
                trackers=trackers, watchdog=Watchdog(scratch, plan.cluster.size, patience_s(plan, run)),
                kl_bound=run.kl_bound,
            ) as monitor,
        ):  # fmt: skip
            yield monitor


def check_done(run: RunFile, lines: Sequence[Metrics], asked: Sequence[str]) -> None:
    """Raise Stopped for a run that was asked to stop and did, with a checkpoint."""
    if len(lines) < run.iterations:
        by = asked[0] if asked else "a signal"
        done = f"{len(lines)} of {run.iterations} iterations are done, and in the checkpoint"
        raise Stopped(f"stopped by {by}: {done}", "the same command with --resume goes on from there")


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder of this user alone for what the ranks say."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def stopped_by_signals(run: RunFile, scratch: Path) -> Iterator[list[str]]:
    """The first of STOP_SIGNALS asks the ranks for a checkpoint, where they write any, and is kept by name; others
    become Stopped at once, so that ranks and files are cleared away."""
    asked, heard = list[str](), list[str]()  # others may ask as well: this process's second signal is its own
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def stop(number: int, _: object) -> None:
        name = signal.Signals(number).name
        if heard or number == signal.SIGHUP or not run.checkpoint.every or not os.path.isdir(scratch):
            raise Stopped(f"stopped by {name}")
        heard.append(name)
        asked.append(name)
        stop_request(scratch).touch()
        print(f"{name}: stopping with a checkpoint when this iteration is done; once more: at once", file=sys.stderr)

    old = {number: signal.signal(number, stop) for number in (*STOP_SIGNALS, signal.SIGHUP)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
