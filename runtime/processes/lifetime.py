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

BATCH_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What batch systems send to every process of a job before they end it; with slurm's `--signal` the user chooses."""
STOP_SIGNALS = (signal.SIGINT, *BATCH_SIGNALS)
"""What asks a run to stop: these, and the keyboard."""


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
def deaf_children() -> Iterator[None]:
    """Processes that this thread starts meanwhile do not hear the signals of batch systems until they say so (`hear`);
    this one hears them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BATCH_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear() -> None:
    """Let this process hear the signals that its parent kept from it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BATCH_SIGNALS)


def end_at_once(code: int) -> NoReturn:
    """End this process, a rank that has failed, with an exit code. Leaving Python would wait for the threads of
    collectives, and those for peers that are cut off: no connection breaks there, so that they wait without end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
