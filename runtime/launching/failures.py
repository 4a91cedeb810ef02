"""Why a run failed: what ranks wrote before they went, and which of it is the cause."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from plans.errors import RealplanError
from runtime.reports.records import Status, read_status

# What gloo and NCCL say; torch has no types for it.
_LOST_PEER = ("Connection closed by peer", "Connection reset", "Connection refused", "Broken pipe", "Read error")
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


class RunFailed(RealplanError):
    """A run that ended on some rank. `details`: that rank's traceback, where it had one."""

    def __init__(self, message: str, hint: str = "", details: str = "") -> None:
        super().__init__(message, hint)
        self.details = details


@dataclass(frozen=True, slots=True)
class Failure:
    """One rank's error. `secondary`: it only noticed that another rank went away; `late`: it waited too long."""

    message: str
    hint: str
    secondary: bool
    late: bool
    at_s: float
    details: str


def write_failure(folder: Path, rank: int, error: Exception) -> Failure:
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
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"error-{rank}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(failure)))
    partial.rename(path)
    return failure


def find_cause(folder: Path, exit_codes: Mapping[int, int]) -> RunFailed:
    """The cause of a failed run. `exit_codes`: of the ranks that ended by themselves, negative for a signal.

    A rank that was killed, or the earliest error that is not about a lost peer.
    """
    failures = {int(p.stem.removeprefix("error-")): Failure(**json.loads(p.read_text())) for p in _errors(folder)}
    for rank, code in sorted(exit_codes.items()):
        if rank not in failures and code != 0:
            return _vanished(folder, rank, code)
    if not failures:
        return RunFailed("the run ended without a word from any rank", "run again with --debug")
    first = min(failures.values(), key=lambda f: (f.secondary, f.late, f.at_s))
    where = _places(folder) if first.late else ""
    return RunFailed(first.message + where, first.hint, first.details)


def kill_ranks(folder: Path) -> None:
    """End every rank that still runs, also one that is stopped or deaf to requests."""
    for status in _statuses(folder).values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(status.pid, signal.SIGKILL)


def has_failed(folder: Path) -> bool:
    """Whether a rank has left an error."""
    return bool(_errors(folder))


def _statuses(folder: Path) -> dict[int, Status]:
    ranks = sorted(int(path.name.removeprefix("status-")) for path in folder.glob("status-*"))
    found = {rank: read_status(folder, rank) for rank in ranks}
    return {rank: status for rank, status in found.items() if status is not None}


def _places(folder: Path) -> str:
    places = [f"rank {r} was in iteration {s.iteration}, step `{s.step}`" for r, s in _statuses(folder).items()]
    return "\n" + "\n".join(places)


def _errors(folder: Path) -> list[Path]:
    return sorted(folder.glob("error-*.json"))


def _vanished(folder: Path, rank: int, code: int) -> RunFailed:
    status = read_status(folder, rank)
    where = "while it started"
    if status is not None and status.step:
        where = f"in iteration {status.iteration}, step `{status.step}`"
    if code >= 0:
        return RunFailed(f"rank {rank} exited with code {code} {where}")
    name = signal.Signals(-code).name
    hint = "the system kills a process when memory runs out; `dmesg` tells" if name == "SIGKILL" else ""
    return RunFailed(f"rank {rank} was killed by {name} {where}", hint)
