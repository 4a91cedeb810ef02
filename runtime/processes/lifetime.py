"""Processes that end with the one that needs them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from threading import Thread
from typing import NoReturn


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_with(pid: int, end: Callable[[], None] = _end) -> None:
    """Call `end` (SIGKILL to this process) when another process ends, however it does.

    Not `PR_SET_PDEATHSIG`: the parent of a forked rank is the fork server, which lives as long as its ranks. Without
    pidfd (Linux 5.3) nothing is watched. Raises ProcessLookupError when the other one is gone already.
    """

    def watch(descriptor: int) -> None:
        select.select([descriptor], [], [])
        end()

    with contextlib.suppress(AttributeError, PermissionError):
        Thread(target=watch, args=(os.pidfd_open(pid),), daemon=True).start()


@contextlib.contextmanager
def deaf_children(number: signal.Signals) -> Iterator[None]:
    """Processes that this thread starts meanwhile do not hear a signal until they say so (`hear`); this one hears it
    afterwards. A batch system sends its signals to every process of a job."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (number,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear(number: signal.Signals) -> None:
    """Let this process hear a signal that its parent kept from it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (number,))


def end_at_once(code: int) -> NoReturn:
    """End this process, a rank that has failed, with an exit code. Leaving Python would wait for the threads of
    collectives, and those for peers that are cut off: no connection breaks there, so that they wait without end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
