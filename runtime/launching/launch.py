"""Start a run on this machine: its ranks are processes of this one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from plans.plan import ExecutionPlan
from plans.runfile import RunFile
from runtime.checkpoints.complete import Completer
from runtime.checkpoints.resume import Start
from runtime.launching.entry import prepare_ranks
from runtime.launching.keeping import check_done, kept_files, own_output, stopped_by_signals
from runtime.launching.ranks import LocalRanks, follow
from runtime.launching.restarts import with_restarts
from runtime.processes.member import Member
from runtime.reports.metrics import Metrics


def launch(plan: ExecutionPlan, run: RunFile, start: Start | None = None) -> Sequence[Metrics]:
    """Run a plan; the metrics of its iterations. Raises RunFailed with the cause, RealplanError for wrong input.

    start: where the run begins, None for its first iteration.
    """
    start = start or Start()
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
