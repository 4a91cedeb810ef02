"""Start a run: the ranks of one machine as processes of this one, or this process as one rank of many."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from plans.plan import ExecutionPlan
from plans.runfile import RunFile, patience_s
from runtime.checkpoints.complete import Completer
from runtime.checkpoints.folder import prepare_folder, stop_request
from runtime.checkpoints.resume import Start
from runtime.launching.entry import (
    launched_worker,
    multiprocessing_folder,
    prepare_joining,
    prepare_ranks,
    start_method,
)
from runtime.launching.output import held_output, keep_plan, save_run
from runtime.launching.restarts import with_restarts
from runtime.processes.failures import find_cause, knows_cause
from runtime.processes.lifetime import die_with
from runtime.processes.member import Address, Member
from runtime.reports.endings import RunFailed, Stopped
from runtime.reports.metrics import Metrics
from runtime.reports.monitor import Monitor
from runtime.reports.records import read_status
from runtime.reports.trackers import Trackers
from runtime.reports.watchdog import Watchdog

POLL_S = 0.5
GRACE_S = 3.0  # longer than a rank that lost a peer waits before it ends itself
LEAVE_S = 10.0  # for ranks that are done to end


def launch(
    plan: ExecutionPlan, run: RunFile, member: Member | None = None, start: Start | None = None
) -> Sequence[Metrics]:
    """Run a plan; the metrics of its iterations. Raises RunFailed with the cause, RealplanError for wrong input.

    member: the rank that another launcher (torchrun, srun) has made of this process; rank 0 keeps the files. start:
    where the run begins, None for its first iteration.
    """
    start = start or Start()
    if member is not None:
        return _join(plan, run, member, start)
    scratch = Path(run.output) / ".ranks"
    with _stopped_by_signals(run, scratch) as asked, _own_output(plan, run, start):
        lines = with_restarts(plan, run, start, lambda now, at: _attempt_from(now, run, at, scratch), asked)
    _check_done(run, lines, asked)
    return lines


def _attempt_from(plan: ExecutionPlan, run: RunFile, start: Start, scratch: Path) -> Sequence[Metrics]:
    with _kept_files(plan, start.of(run), start, scratch) as monitor:
        attempt(plan, start.of(run), scratch, monitor.check)
    return monitor.lines


@contextmanager
def _own_output(plan: ExecutionPlan, run: RunFile, start: Start) -> Iterator[None]:
    """Hold the output folder for all attempts of a run."""
    with held_output(plan, run, goes_on=start.own) as earlier:
        if earlier is not None:
            print(f"the output of an earlier run is now in {earlier}", file=sys.stderr)
        yield


@contextmanager
def _kept_files(plan: ExecutionPlan, run: RunFile, start: Start, scratch: Path) -> Iterator[Monitor]:
    """The files of an attempt, kept while its ranks run: what ranks say, metrics and checkpoints."""
    with _scratch(scratch):
        prepare_folder(plan, run)
        save_run(start.of(run))
        keep_plan(plan, Path(run.output))
        # The monitor leaves first: the last checkpoint waits for the last line of metrics.
        with (
            Completer(run, plan.cluster.size),
            closing(Trackers(plan, run)) as trackers,
            Monitor(
                plan, run.iterations, scratch, Path(run.output), start.lines,
                trackers=trackers, watchdog=Watchdog(scratch, plan.cluster.size, patience_s(plan, run)),
                kl_bound=run.kl_bound,
            ) as monitor,
        ):  # fmt: skip
            yield monitor


def _check_done(run: RunFile, lines: Sequence[Metrics], asked: Sequence[str]) -> None:
    """Raise Stopped for a run that was asked to stop and did, with a checkpoint."""
    if len(lines) < run.iterations:
        by = asked[0] if asked else "a signal"
        done = f"{len(lines)} of {run.iterations} iterations are done, and in the checkpoint"
        raise Stopped(f"stopped by {by}: {done}", "the same command with --resume goes on from there")


def attempt(plan: ExecutionPlan, run: RunFile, scratch: Path, check: Callable[[], None]) -> None:
    """Start every rank once and wait until all are done. Raises RunFailed with the cause when one of them is not, and
    what `check` raises, which is asked now and then; no rank is left then. The ranks meet in a file that only this user
    can open."""
    prepare_ranks(plan)
    context: Any = multiprocessing.get_context(start_method(plan))
    ranks: dict[int, Any] = {}
    with tempfile.TemporaryDirectory(prefix="realplan-", ignore_cleanup_errors=True) as private:
        traces = (scratch, Path(private), *multiprocessing_folder())
        try:
            for rank in range(plan.cluster.size):
                member = Member(rank, plan.cluster.size, rank, Path(private) / "store")
                ranks[rank] = context.Process(
                    target=launched_worker, args=(plan, run, member, scratch, os.getpid(), traces), name=f"rank {rank}"
                )
                ranks[rank].start()
            codes = _wait(ranks, scratch, check)
        finally:
            for process in ranks.values():
                if process.pid is not None:
                    process.kill()
            for process in ranks.values():
                if process.pid is not None:
                    process.join()
    if len(_done(scratch, ranks)) < len(ranks):
        raise find_cause(scratch, codes, Path(run.output))


def _wait(ranks: dict[int, Any], scratch: Path, check: Callable[[], None]) -> dict[int, int]:
    """Exit codes of the ranks that ended by themselves, when all are done or one has failed."""
    running = dict(ranks)
    deadline = float("inf")
    while running and time.monotonic() < deadline:
        wait([process.sentinel for process in running.values()], timeout=POLL_S)
        check()
        ended = [rank for rank, process in running.items() if process.exitcode is not None]
        for rank in ended:
            del running[rank]
        done = _done(scratch, ranks)
        if len(done) == len(ranks):
            deadline = min(deadline, time.monotonic() + LEAVE_S)
        elif knows_cause(scratch, [rank for rank in ranks if rank not in running and rank not in done]):
            break
        elif ended and not set(ended) <= done:
            deadline = min(deadline, time.monotonic() + GRACE_S)
    return {rank: process.exitcode for rank, process in ranks.items() if process.exitcode is not None}


def _done(scratch: Path, ranks: dict[int, Any]) -> set[int]:
    found = {rank: read_status(scratch, rank) for rank in ranks}
    return {rank for rank, status in found.items() if status is not None and status.done}


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
def _stopped_by_signals(run: RunFile, scratch: Path) -> Iterator[Sequence[str]]:
    """The first SIGINT or SIGTERM asks the ranks for a checkpoint, where they write any, and is kept by name; others
    become Stopped at once, so that ranks and files are cleared away."""
    asked: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def stop(number: int, _: object) -> None:
        name = signal.Signals(number).name
        if asked or number == signal.SIGHUP or not run.checkpoint.every or not os.path.isdir(scratch):
            raise Stopped(f"stopped by {name}")
        asked.append(name)
        stop_request(scratch).touch()
        print(f"{name}: stopping with a checkpoint when this iteration is done; once more: at once", file=sys.stderr)

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _join(plan: ExecutionPlan, run: RunFile, member: Member, start: Start) -> Sequence[Metrics]:
    """One rank under torchrun or srun; all machines see one file system."""
    from runtime.worker import guarded

    assert isinstance(member.meeting, Address)
    die_with(os.getppid())
    prepare_joining(plan, member.meeting)
    scratch = Path(run.output) / f".ranks-{re.sub('[^A-Za-z0-9]', '-', member.meeting.job)[:40]}"
    lines: Sequence[Metrics] = ()
    if member.rank != 0:
        failure = guarded(plan, run, member, scratch)
    else:  # makes the folders before it joins the others, who write only after that
        with _own_output(plan, run, start), _kept_files(plan, run, start, scratch) as monitor:
            failure = guarded(plan, start.of(run), member, scratch)
        lines = monitor.lines
    if failure is not None:
        shutil.rmtree(scratch, ignore_errors=True)
        raise RunFailed(failure.message, failure.hint, failure.details)
    if member.rank == 0:
        _check_done(run, lines, ())
    return lines
