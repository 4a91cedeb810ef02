"""Why a run failed: what ranks wrote before they went, and which of it is the cause."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from plans.errors import RealplanError
from plans.files import write_atomically
from runtime.reports.endings import RunFailed
from runtime.reports.records import crash_path, read_status, reserve_path

# What gloo, NCCL and the store of the ranks say; torch has no types for it.
_LOST_PEER = (
    "Connection closed by peer", "Connection reset", "Connection refused", "Broken pipe", "Read error", "got 0 bytes",
)  # fmt: skip
_TIMED_OUT = ("Timed out", "timed out", "Timeout", "timeout")


def lost_peer(text: str) -> bool:
    """Whether an error says that another rank went away."""
    return any(words in text for words in _LOST_PEER)


def timed_out(text: str) -> bool:
    """Whether an error says that another rank did not come in time."""
    return any(words in text for words in _TIMED_OUT)


MEMORY_HINT = (
    "more micro_batches, `recompute: full`, offload or a larger mesh for this call; "
    "`realplan check` shows what was predicted, call by call"
)


def memory_words(text: str) -> str:
    """What torch says of a full GPU, up to what is free: the rest is advice about its allocator."""
    found = re.search(r"Tried to allocate .*? of which .*? free\.", text, re.DOTALL)
    return " ".join((found[0] if found else text.partition("\n")[0]).split())


@dataclass(frozen=True, slots=True)
class Failure:
    """One rank's error. `secondary`: it only noticed that another rank went away; `late`: it waited too long;
    `nonfinite`: the iteration whose numbers are not finite."""

    message: str
    hint: str
    secondary: bool
    late: bool
    at_s: float
    details: str
    nonfinite: int | None = None


def write_failure(folder: Path, rank: int, error: BaseException) -> Failure:
    """Keep a rank's error for the launching process."""
    message, hint, secondary = f"rank {rank}: {type(error).__name__}: {error}", "", lost_peer(str(error))
    if isinstance(error, RealplanError):
        message, hint, secondary = error.message, error.hint, getattr(error, "secondary", False)
    failure = Failure(
        message=message,
        hint=hint,
        secondary=secondary,
        late=getattr(error, "late", False),
        at_s=time.time(),
        details="".join(traceback.format_exception(error)),
        nonfinite=getattr(error, "nonfinite", None),
    )
    try:
        _keep(folder, rank, failure)
    except OSError:  # the disk is full
        reserve_path(folder, rank).unlink(missing_ok=True)
        with suppress(OSError):
            _keep(folder, rank, replace(failure, details=""))
    return failure


def error_path(folder: Path, rank: int) -> Path:
    """Where a rank leaves its error."""
    return folder / f"error-{rank}.json"


def _keep(folder: Path, rank: int, failure: Failure) -> None:
    path = error_path(folder, rank)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    partial.rename(path)


def knows_cause(folder: Path, ended: Sequence[int]) -> bool:
    """Whether one of the ranks that ended without being done says why, or was ended itself, and did not just lose a
    peer."""
    failures = _failures(folder)
    return any(rank not in failures or not failures[rank].secondary for rank in ended)


def find_cause(folder: Path, exit_codes: Mapping[int, int | None], output: Path | None = None) -> RunFailed:
    """The cause of a failed run. `exit_codes`: of the ranks that ended by themselves, negative for a signal, None where
    nobody was told.

    A rank that ended without a word and without being done, whatever its code, or the earliest error that is not about
    a lost peer. The stacks of a rank that a signal ended go to a file in `output`.
    """
    failures = _failures(folder)
    for rank, code in sorted(exit_codes.items()):
        status = read_status(folder, rank)
        if rank not in failures and not (status is not None and status.done):
            return _vanished(folder, rank, code, output)
    if not failures:
        return RunFailed("the run ended without a word from any rank", "run again with --debug")
    first = min(failures.values(), key=lambda f: (f.secondary, f.late, f.at_s))
    where = "".join(f"\n{line}" for line in places(folder, first.at_s)) if first.late else ""
    return RunFailed(first.message + where, first.hint, first.details, first.nonfinite)


def places(folder: Path, now_s: float, some: Sequence[int] | None = None) -> list[str]:
    """Where every rank is, or some are, and for how long: a line for each, of the ranks that have started."""
    ranks = sorted(int(path.name.removeprefix("status-")) for path in folder.glob("status-*"))
    ranks = ranks if some is None else [rank for rank in ranks if rank in some]
    found = {rank: read_status(folder, rank) for rank in ranks}
    return [status.line(rank, now_s) for rank, status in found.items() if status is not None and status.step]


def _failures(folder: Path) -> dict[int, Failure]:
    return {
        int(path.stem.removeprefix("error-")): Failure(**json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("error-*.json"))
    }


def _vanished(folder: Path, rank: int, code: int | None, output: Path | None) -> RunFailed:
    status = read_status(folder, rank)
    where = status.place if status is not None else "while it started"
    if code is None or code >= 0:
        said = "" if code is None else f" (exit code {code})"
        return RunFailed(f"rank {rank} ended{said} {where}, before it was done")
    number = -code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    said = f"rank {rank} was killed by {name} {where}"
    if name == "SIGABRT":  # NCCL's way to end a collective that waits for longer than its timeout
        said += "".join(f"\n{line}" for line in places(folder, time.time()))
    return RunFailed(said, _hint(name, _keep_stacks(folder, rank, output)))


def _hint(signal_name: str, stacks: Path | None) -> str:
    if signal_name == "SIGKILL":
        return "the system kills a process when memory runs out; `dmesg` tells"
    waited = "NCCL ends a rank so that waits longer than timeout_s for its peers; " if signal_name == "SIGABRT" else ""
    return waited + (f"its stacks are in {stacks}" if stacks else "")


def _keep_stacks(folder: Path, rank: int, output: Path | None) -> Path | None:
    source = crash_path(folder, rank)
    if output is None or not os.path.isfile(source) or not source.stat().st_size:
        return None
    target = output / f"crash-rank-{rank}.txt"
    write_atomically(target, source.read_text(encoding="utf-8", errors="replace"))
    return target
