"""A request to stop becomes one decision of all ranks: the iteration before which they stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from enum import Enum
from pathlib import Path
from threading import Event, Thread
from typing import Any

from plans.program import Program, StepKind
from runtime.checkpoints.folder import stop_request
from runtime.groups import in_time

ASKED = "realplan/stop"
"""Of the store: somebody has asked."""
LOOK_S = 0.1
POLL_S = 0.1


class Part(Enum):
    """How a rank comes into an iteration: it begins it, or it waits for what others make of it, or has nothing to do in
    any."""

    BEGINS = "begins"
    FOLLOWS = "follows"
    IDLE = "idle"


def part_of(program: Program, rank: int) -> Part:
    """How a rank comes into the iterations of a program.

    A rank whose first step takes something from others may reach that step long before they come to it. Where calls
    lag, it has work of an earlier iteration left after that step, so it does not wait there.
    """
    own = program.projection(rank)
    if not own:
        return Part.IDLE
    if program.max_lag or own[0].kind not in (StepKind.TRANSFER, StepKind.REALLOCATE):
        return Part.BEGINS
    roles = {copy.name: copy.role for copy in program.copies}
    sends = own[0].kind is StepKind.REALLOCATE and rank in program.homes[roles[own[0].copy]].layout.ranks
    return Part.BEGINS if sends else Part.FOLLOWS


class StopAgreement:
    """Whether to stop before an iteration, the same on every rank.

    store: of the ranks. timeout: how long a rank waits for the store, and one that follows for another to begin.

    Ranks reach an iteration at different times, so none may decide by itself, and none that has work waits for those
    that are behind. The first one to begin an iteration decides for all: it takes place, or where somebody has asked by
    then, it does not. So nothing is begun after a request, and what is begun is done to its end.
    """

    def __init__(self, scratch: Path, store: Any, timeout: timedelta) -> None:
        self._request, self._store, self._timeout = stop_request(scratch), store, timeout
        self._asked = False
        self._closed = Event()

    def listen(self, *signals: signal.Signals) -> None:
        """Take signals to this process as requests, and tell the other ranks of requests. Main thread only."""
        for number in signals:
            signal.signal(number, self._ask)
        Thread(target=self._tell, name="requests", daemon=True).start()

    def _ask(self, number: int, _: object) -> None:
        self._asked = True
        if number == signal.SIGINT:  # the second one ends the process
            signal.signal(number, signal.SIG_DFL)

    def _here(self) -> bool:
        """Whether this process was asked, or the launcher of its machine."""
        return self._asked or os.path.exists(self._request)

    def _tell(self) -> None:
        with suppress(RuntimeError):  # without the store the run ends anyway
            while not self._closed.wait(LOOK_S):
                if self._here():
                    self._store.set(ASKED, "")
                    return

    def before(self, iteration: int, part: Part) -> bool:
        """Whether all ranks stop before this iteration. Every rank calls it for every iteration that it reaches.

        Raises TimeoutError, and RuntimeError where the store is gone.
        """
        key = f"realplan/iteration/{iteration}"
        if part is Part.BEGINS:
            return self._in_time(lambda: self._decide(key))
        began = time.monotonic()
        while not self._in_time(lambda: self._store.check([key])):
            waited = time.monotonic() - began
            if part is Part.FOLLOWS and waited > self._timeout.total_seconds():
                raise TimeoutError("timed out")
            time.sleep(min(POLL_S, 0.001 + waited / 50))  # the wait is at most 2 % longer for it
        return self._in_time(lambda: bool(self._store.get(key) == b"stop"))

    def _decide(self, key: str) -> bool:
        mine = "stop" if self._here() or self._store.check([ASKED]) else "go"
        return bool(self._store.compare_set(key, "", mine) == b"stop")

    def _in_time(self, work: Callable[[], bool]) -> bool:
        return in_time(work, self._timeout)

    def close(self) -> None:
        """Tell of no more requests."""
        self._closed.set()
