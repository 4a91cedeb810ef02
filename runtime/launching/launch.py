"""Start a run: the ranks of one machine as processes of this one, or this process as one rank of many."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from plans.plan import ExecutionPlan
from plans.runfile import RunFile
from runtime.checkpoints.complete import Completer
from runtime.checkpoints.resume import Start
from runtime.launching.entry import prepare_joining, prepare_ranks
from runtime.launching.keeping import check_done, kept_files, own_output, stopped_by_signals
from runtime.launching.ranks import LocalRanks, follow
from runtime.launching.restarts import with_restarts
from runtime.processes.lifetime import die_with
from runtime.processes.member import Address, Member
from runtime.reports.endings import RunFailed
from runtime.reports.metrics import Metrics


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
    with stopped_by_signals(run, scratch) as asked, own_output(plan, run, start):
        lines = with_restarts(plan, run, start, lambda now, at: _attempt_from(now, run, at, scratch), asked)
    check_done(run, lines, asked)
    return lines


def _attempt_from(plan: ExecutionPlan, run: RunFile, start: Start, scratch: Path) -> Sequence[Metrics]:
    with kept_files(plan, start.of(run), start, scratch, Completer(run, plan.cluster.size)) as monitor:
        attempt(plan, start.of(run), scratch, monitor.check)
    return monitor.lines


def attempt(plan: ExecutionPlan, run: RunFile, scratch: Path, check: Callable[[], None]) -> None:
    """Start every rank once and wait until all are done. Raises RunFailed with the cause when one of them is not, and
    what `check` raises, which is asked now and then; no rank is left then. The ranks meet in a file that only this user
    can open."""
    prepare_ranks(plan)
    size = plan.cluster.size

    def member(rank: int, private: Path) -> Member:
        return Member(rank, size, rank, private / "store")

    with LocalRanks(plan, run, range(size), scratch, member) as ranks:
        follow(ranks, scratch, check, Path(run.output))


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
        completer = Completer(run, plan.cluster.size)
        with own_output(plan, run, start), kept_files(plan, run, start, scratch, completer) as monitor:
            failure = guarded(plan, start.of(run), member, scratch)
        lines = monitor.lines
    if failure is not None:
        shutil.rmtree(scratch, ignore_errors=True)
        raise RunFailed(failure.message, failure.hint, failure.details)
    if member.rank == 0:
        check_done(run, lines, ())
    return lines
