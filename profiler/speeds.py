"""Quick speeds of memory and links of this machine as JSON: what `realplan doctor` shows. Some seconds in all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch

from plans.cluster import MIB
from plans.errors import RealplanError
from profiler.collectives import device_count, measure_collectives
from profiler.timers import Timed, measure

SIZE, CPU_SIZE = 1024 * MIB, 64 * MIB
MESSAGES = (64 * 1024, 64 * MIB)
BUDGET_S = 0.1


def memory_speeds(device: torch.device) -> dict[str, float]:
    """GB/s of a copy in the device's memory (read and written), and of pinned host memory to a GPU and back."""
    size = SIZE if device.type == "cuda" else CPU_SIZE
    here, there = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    found = {"copy, GB/s read and written": 2 * size / _seconds(lambda: there.copy_(here), device) / 1e9}
    if device.type == "cuda":
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        up = _seconds(lambda: here.copy_(host, non_blocking=True), device)
        down = _seconds(lambda: host.copy_(here, non_blocking=True), device)
        found |= {"pinned host to GPU, GB/s": size / up / 1e9, "GPU to pinned host, GB/s": size / down / 1e9}
    return found


def link_speeds(device: torch.device) -> dict[str, float]:
    """Bus bandwidth of an all-reduce between all devices (2 (n - 1) / n x bytes / s), and the time of a small one."""
    ranks = min(device_count(device), 8 if device.type == "cuda" else 2)
    if ranks < 2:
        return {}
    times = measure_collectives(device, ranks, MESSAGES)["all_reduce_node"]
    small, large = (times[ranks, size].seconds for size in MESSAGES)
    bus = 2 * (ranks - 1) / ranks * MESSAGES[1] / large / 1e9
    label = f"all-reduce between {ranks} {'GPUs' if device.type == 'cuda' else 'CPU processes'}"
    return {f"{label}, 64 MiB, bus GB/s": bus, f"{label}, 64 KiB, ms": small * 1e3}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    return measure(Timed(lambda _: run()), device, BUDGET_S).seconds


def main() -> int:
    """Print the speeds."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    found = memory_speeds(device)
    try:
        found |= link_speeds(device)
    except (RealplanError, RuntimeError) as error:
        print(f"links: {error}", file=sys.stderr)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
