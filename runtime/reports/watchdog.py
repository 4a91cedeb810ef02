"""Says early where a run stands still: which rank, in which step of which iteration, and for how long."""

from __future__ import annotations

import time
from pathlib import Path

from runtime.reports.records import read_status

WARNED_AT = 0.5
"""Part of `timeout_s` that a rank may spend in one step before it is named."""


class Watchdog:
    """Watches the status of every rank. patience_s: how long ranks wait for each other."""

    def __init__(self, folder: Path, ranks: int, patience_s: float) -> None:
        self._folder, self._ranks, self._patience_s = folder, ranks, patience_s
        self._named: set[tuple[int, str, int]] = set()

    def look(self, now_s: float | None = None) -> list[str]:
        """Lines to print when a rank has been in one step for longer than half the time-out, once for each such step;
        where the other ranks are stands below it. now_s: time.time()."""
        now_s = time.time() if now_s is None else now_s
        places = {
            rank: status for rank in range(self._ranks) if (status := read_status(self._folder, rank)) is not None
        }
        slow = [
            rank
            for rank, status in places.items()
            if status.step and not status.done and now_s - status.since_s > WARNED_AT * self._patience_s
        ]
        new = {(rank, places[rank].step, places[rank].iteration) for rank in slow} - self._named
        if not new:
            return []
        self._named |= new
        longest = max(now_s - places[rank].since_s for rank in slow)
        head = f"no progress for {longest:.0f} s of timeout_s = {self._patience_s:g} s; a rank hangs, or is slow:"
        return [head, *(f"  {status.line(rank, now_s)}" for rank, status in places.items() if status.step)]
