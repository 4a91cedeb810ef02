"""The ranks of an attempt as processes of a machine, and the wait for all of them."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from plans.plan import ExecutionPlan
from plans.runfile import RunFile
from runtime.launching.entry import launched_worker, multiprocessing_folder, prepare_ranks, start_method
from runtime.processes.failures import find_cause, knows_cause
from runtime.processes.lifetime import deaf_children
from runtime.processes.member import Address, Member
from runtime.reports.records import read_status

POLL_S = 0.5
GRACE_S = 3.0  # longer than a rank that lost a peer waits before it ends itself
LEAVE_S = 10.0  # for ranks that are done to end


class Ranks(Protocol):
    """Ranks that somebody has started."""

    @property
    def numbers(self) -> Sequence[int]:
        """All of them."""

    @property
    def codes(self) -> Mapping[int, int | None]:
        """Exit codes of those that ended by themselves, negative for a signal; None where nobody was told."""

    def wait(self, timeout_s: float) -> None:
        """Wait until another one has ended, or for so long."""


class HeldRanks(Ranks, Protocol):
    """Ranks of this machine, that whoever has them can end."""

    def end(self) -> None:
        """See that none is left, as far as that is in this process's hands."""


Starter = Callable[[ExecutionPlan, RunFile, Sequence[int], Path, Address, Sequence[Path]], HeldRanks]
"""Has ranks of this machine begin: their plan, run file and numbers, where they leave word, where they meet, and more
folders that go where this process is killed."""


class LocalRanks:
    """Ranks as processes of this one, from the start on; on leaving none is left. It makes a private folder, in which
    the ranks of one machine meet: `member` is given it. traces: more folders that go where this process is killed."""

    def __init__(
        self,
        plan: ExecutionPlan,
        run: RunFile,
        numbers: Sequence[int],
        scratch: Path,
        member: Callable[[int, Path], Member],
        traces: Sequence[Path] = (),
    ) -> None:
        self.numbers = numbers
        inside = next(iter(multiprocessing_folder()), None)  # which the fork server takes away
        self._private = tempfile.TemporaryDirectory(prefix="realplan-", dir=inside, ignore_cleanup_errors=True)
        self._processes: dict[int, Any] = {}
        private = Path(self._private.name)
        context: Any = multiprocessing.get_context(start_method(plan))
        traces = (scratch, private, *multiprocessing_folder(), *traces)
        try:
            for rank in numbers:
                words = (plan, run, member(rank, private), scratch, os.getpid(), traces)
                self._processes[rank] = context.Process(target=launched_worker, args=words, name=f"rank {rank}")
                with deaf_children():
                    self._processes[rank].start()
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def codes(self) -> Mapping[int, int | None]:
        """Exit codes of those that ended."""
        return {rank: p.exitcode for rank, p in self._processes.items() if p.exitcode is not None}

    def wait(self, timeout_s: float) -> None:
        """Wait until another one has ended, or for so long."""
        wait([p.sentinel for p in self._processes.values() if p.exitcode is None], timeout=timeout_s)

    def end(self) -> None:
        """Kill what still runs, and wait until it is gone."""
        started = [process for process in self._processes.values() if process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join()
        self._private.cleanup()


def start_ranks(
    plan: ExecutionPlan, run: RunFile, numbers: Sequence[int], scratch: Path, address: Address, traces: Sequence[Path]
) -> LocalRanks:
    """The ranks of one of several machines as processes of this one, which meet those of the others at an address."""
    prepare_ranks(plan, address)

    def member(rank: int, _: Path) -> Member:
        return Member(rank, plan.cluster.size, rank - numbers[0], address)

    return LocalRanks(plan, run, numbers, scratch, member, traces)


def follow(ranks: Ranks, scratch: Path, check: Callable[[], None], output: Path) -> None:
    """Wait until all ranks are done. Raises RunFailed with the cause when one of them is not, and what `check` raises,
    which is asked now and then. scratch: where the ranks leave word."""
    deadline, before, codes = float("inf"), set[int](), dict[int, int | None]()
    while len(codes) < len(ranks.numbers) and monotonic() < deadline:
        ranks.wait(POLL_S)
        check()
        codes = dict(ranks.codes)
        new, before = set(codes) - before, set(codes)
        done = _done(scratch, ranks.numbers)
        if len(done) == len(ranks.numbers):
            deadline = min(deadline, monotonic() + LEAVE_S)
        elif knows_cause(scratch, [rank for rank in codes if rank not in done]):
            break
        elif not new <= done:
            deadline = min(deadline, monotonic() + GRACE_S)
    if len(_done(scratch, ranks.numbers)) < len(ranks.numbers):
        raise find_cause(scratch, codes, output)


def _done(scratch: Path, numbers: Sequence[int]) -> set[int]:
    found = {rank: read_status(scratch, rank) for rank in numbers}
    return {rank for rank, status in found.items() if status is not None and status.done}
