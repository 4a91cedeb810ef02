"""Which ranks that another launcher has started share a machine, and whether they still run."""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.processes.failures import error_path
from runtime.reports.endings import RunFailed
from runtime.reports.records import read_status

_SPACES = ("mnt", "net", "pid")
"""What processes see alike that can share files, addresses and numbers of processes."""
_HERE, _PARTY = "realplan/here", "realplan/party"
END_S, LOOK_S = 3.0, 0.05


@dataclass(frozen=True)
class Party:
    """The ranks of a run by machine, that of rank 0 first, each in order; `pids` by rank; where the first machine
    hears the others."""

    ranks: Sequence[Sequence[int]]
    pids: Sequence[int]
    host: str
    port: int

    def machine_of(self, rank: int) -> int:
        """The number of a rank's machine."""
        return next(node for node, ranks in enumerate(self.ranks) if rank in ranks)


def say_here(store: Any, rank: int, folders: Sequence[Path]) -> None:
    """Tell rank 0 what it asks of every process. folders: where a rank writes; one that writes elsewhere counts as on
    another machine, so that somebody keeps its files."""
    places = [socket.gethostname(), _boot(), *(os.path.realpath(folder) for folder in folders)]
    for space in _SPACES:
        with suppress(OSError):  # not Linux
            places.append(os.readlink(f"/proc/self/ns/{space}"))
    store.set(f"{_HERE}/{rank}", json.dumps({"place": places, "pid": os.getpid()}))


def _boot() -> str:
    """What two machines of one name do not have alike."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
    except OSError:
        return ""


def gather(store: Any, world: int) -> tuple[list[list[int]], list[int]]:
    """The ranks by machine, and their processes, as all have said. For rank 0. Raises RunFailed for one that says
    nothing within the time of the store."""
    found = [heard(store, f"{_HERE}/{rank}", f"rank {rank}") for rank in range(world)]
    machines: dict[str, list[int]] = {}
    for rank, each in enumerate(found):
        machines.setdefault(json.dumps(each["place"]), []).append(rank)
    return list(machines.values()), [int(each["pid"]) for each in found]


def publish(store: Any, party: Party) -> None:
    """Tell all ranks. For rank 0."""
    store.set(_PARTY, json.dumps([party.ranks, party.pids, party.host, party.port]))


def published(store: Any) -> Party:
    """What rank 0 has told. Raises RunFailed as `gather` does."""
    return Party(*heard(store, _PARTY, "rank 0"))


def heard(store: Any, key: str, who: str) -> Any:
    """What somebody has left in the store of the ranks, which is open to whoever reaches it. Raises RunFailed for what
    is no word of a rank, and where there is none within the time of the store."""
    try:
        return json.loads(store.get(key).decode())
    except (RuntimeError, ValueError) as error:
        hint = "what did the others say? `timeout_s` in the run file is how long they wait for each other"
        raise RunFailed(f"nothing is heard of {who}: {str(error).splitlines()[0]}", hint) from None


class JoinedRanks:
    """The ranks of this machine that another launcher has started. scratch: where they leave word. Nobody here is told
    their exit codes, or ends them: the launcher does."""

    def __init__(self, numbers: Sequence[int], pids: Sequence[int], scratch: Path) -> None:
        self.numbers = numbers
        self._pids, self._scratch = pids, scratch

    @property
    def codes(self) -> Mapping[int, int | None]:
        """0 of those that are done, 1 of those that have left an error, None of those whose process is gone."""
        found: dict[int, int | None] = {}
        for rank in self.numbers:
            gone = _gone(self._pids[rank])  # before its last word is looked for
            status = read_status(self._scratch, rank)
            if status is not None and status.done:
                found[rank] = 0
            elif os.path.exists(error_path(self._scratch, rank)):
                found[rank] = 1
            elif gone:
                found[rank] = None
        return found

    def wait(self, timeout_s: float) -> None:
        """Wait for so long."""
        time.sleep(timeout_s)

    def end(self) -> None:
        """Give them time to end, so that none writes to a folder that is cleared away."""
        deadline = time.monotonic() + END_S
        while len(self.codes) < len(self.numbers) and time.monotonic() < deadline:
            time.sleep(LOOK_S)


def _gone(pid: int) -> bool:
    """Whether a process of this machine has ended. Without pidfd (Linux 5.3) none has: its peers find out."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except (AttributeError, OSError):
        return False
    try:
        return bool(select.select([descriptor], [], [], 0)[0])
    finally:
        os.close(descriptor)
