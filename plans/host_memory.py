"""Host memory as the system gives it to a process: of the machine, or of the control group (slurm's `--mem`, a
container) that bounds the process below that."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MEMINFO, CGROUP, CGROUPS = "/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup"
_V1, _V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")

Read = Callable[[str], str]
"""Text of a file of the system; empty where there is none."""


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes that this process may use in all, and of those what nobody uses."""

    total: int
    available: int


def host_memory(read: Read | None = None) -> HostMemory | None:
    """The memory of this machine, or the less that the control groups of this process leave it; None where the system
    does not say."""
    read = read or _read
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+)", read(MEMINFO), re.M)}
    if "MemAvailable" not in kib:
        return None
    total, available = kib.get("MemTotal", kib["MemAvailable"]) * 1024, kib["MemAvailable"] * 1024
    for limit, used in _groups(read):
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return HostMemory(total, available)


def _groups(read: Read) -> Iterator[tuple[int, int]]:
    """Limit and use of every control group that bounds this process. In a container the path may be that of the host,
    where the container sees its own group at the root: that is one of those above."""
    for line in read(CGROUP).splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        roots, names = ([f"{CGROUPS}/memory"], _V1) if kinds else ([CGROUPS, f"{CGROUPS}/unified"], _V2)
        at = PurePosixPath(path)
        for root in roots:
            for group in (at, *at.parents):
                folder = f"{root}{group}".rstrip("/")
                limit, used = (read(f"{folder}/{name}").strip() for name in names)
                if limit.isdigit() and used.isdigit():  # `max` is none
                    yield int(limit), int(used) - _cached(read(f"{folder}/memory.stat"))


def _cached(stat: str) -> int:
    """Bytes that a group uses for files it has read or written, which the kernel takes back when memory is wanted."""
    found = {name: int(value) for name, value in re.findall(r"^(\w+) (\d+)$", stat, re.M)}
    prefix = "total_" if "total_inactive_file" in found else ""  # v1: with the groups below
    return sum(found.get(f"{prefix}{name}", 0) for name in ("inactive_file", "active_file"))


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", errors="replace")
    except OSError:
        return ""
