"""Entry of the processes that `runtime.launch` starts; light, so that the launcher need not import megatron."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

from plans.plan import ExecutionPlan
from plans.runfile import RunFile

PR_SET_PDEATHSIG = 1


def launched_worker(plan: ExecutionPlan, run: RunFile, scratch: Path) -> None:
    """Run one rank; an error, which is in `scratch` by then, ends the process at once and without a traceback."""
    _die_with_parent()
    from runtime.worker import guarded

    if guarded(plan, run, scratch) is not None:
        os._exit(1)


def _die_with_parent() -> None:
    """End when the launching process ends, however it does; the keyboard interrupts that process alone."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
