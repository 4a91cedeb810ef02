"""What a search shows while it runs: best period, bound and gap, on stderr, only where someone looks."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.status import Status

if TYPE_CHECKING:
    from planner.search.portfolio import Progress


class SearchProgress:
    """A status line that is redrawn; silent when stderr is not a terminal."""

    def __init__(self) -> None:
        self._status: Status | None = None
        if sys.stderr.isatty():
            self._status = Console(stderr=True).status("pricing layouts ...")

    def __enter__(self) -> SearchProgress:
        if self._status:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status:
            self._status.stop()

    def update(self, now: Progress) -> None:
        """Show what is known."""
        if not self._status:
            return
        bound = "" if now.bound_s is None else f", bound {now.bound_s:.4g} s, gap {1 - now.bound_s / now.period_s:.2%}"
        self._status.update(f"{now.seconds:5.1f} s: best {now.period_s:.4g} s{bound}, {now.evaluated:,} plans seen")
