"""The operation of torch.distributed that a rank waits in: told while the wait is long, and when it has ended in an
error. Light: no torch."""

from __future__ import annotations

import json
import linecache
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from traceback import walk_stack, walk_tb
from types import FrameType

from runtime.reports.records import Recorder

TOLD_AT = 0.4
"""Part of the time-out that a step takes before its operation is told: the watchdog looks a little later."""
LOOKS = 20
"""Looks in the course of one time-out."""
_OURS = ("runtime.", "megatron.")


def operation_in(frames: Iterable[tuple[FrameType, int]]) -> str:
    """The operation in a stack, its innermost frame first with line numbers: a public function of torch.distributed,
    such as `all_reduce`, or `wait in F` of an operation that was begun before; empty where there is none."""
    waits = False
    for frame, line in frames:
        module, name = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        if module.startswith("torch.distributed.") and "logger" not in module and not name.startswith("_"):
            return name
        if module.startswith(_OURS):
            waits = waits or ".wait()" in linecache.getline(frame.f_code.co_filename, line)
            if waits and not name.startswith("_"):
                return f"wait in {name}"
    return "wait" if waits else ""


def operation_of(error: BaseException) -> str:
    """The operation that an error comes from; empty where it comes from none."""
    return operation_in(_frames(error))


def _frames(error: BaseException | None) -> Iterator[tuple[FrameType, int]]:
    """Where an error was raised, innermost first, after where its cause was."""
    if error is not None:
        yield from _frames(error.__cause__)
        yield from reversed(list(walk_tb(error.__traceback__)))


def tell_operations(recorder: Recorder, patience_s: float) -> None:
    """Have the status of this rank tell the operation that the calling thread is in, where a step is long. patience_s:
    how long ranks wait for each other. It goes on until the process ends."""
    rank = threading.get_ident()

    def look() -> None:
        while True:
            time.sleep(patience_s / LOOKS)
            status = recorder.status
            if status.step and not status.done and time.time() - status.since_s > TOLD_AT * patience_s:
                frame = sys._current_frames().get(rank)
                recorder.tell(status, operation_in(walk_stack(frame)) or _nccl_operation())

    threading.Thread(target=look, name="operations", daemon=True).start()


def _nccl_operation() -> str:
    """The first operation on the GPU that has not ended, for which the host waits somewhere else; empty without NCCL.
    Its flight recorder is what torch's own debug pages read of a run under way."""
    dump = getattr(sys.modules.get("torch._C._distributed_c10d"), "_dump_nccl_trace_json", None)
    with suppress(Exception):  # what it says differs between versions of torch, and a run does not end for it
        if dump is not None:
            return str(json.loads(dump(True, True))["entries"][0]["profiling_name"]).rpartition(":")[2]
    return ""
