"""Collectives between the devices of this machine: one process per device, NCCL or gloo."""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import isotonic_regression
from torch.multiprocessing.spawn import start_processes

from plans.cluster import MIB
from profiler.results import Coordinates
from profiler.timers import WARM_UPS, Timing, summary

KIB = 2**10
CPU_BYTES = (4 * KIB, 64 * KIB, MIB, 16 * MIB, 128 * MIB)
GPU_BYTES = (64 * KIB, MIB, 16 * MIB, 256 * MIB)
STREAM, LONG_STREAM, STREAMS = 20, 3, 7
"""Rounds of a stream, of one with long operations, and how often a stream is timed."""
KERNEL_EXTENTS = {"cpu": 256, "cuda": 1024}
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "send_recv")


def device_count(device: torch.device) -> int:
    """Devices of this machine that can talk to each other; of a CPU the cores, at most eight."""
    return torch.cuda.device_count() if device.type == "cuda" else min(os.cpu_count() or 1, 8)


def measure_collectives(
    device: torch.device, ranks: int, sizes: tuple[int, ...]
) -> dict[str, dict[Coordinates, Timing]]:
    """Entry name (`all_reduce_node`) -> (ranks, bytes of the whole vector) -> time, between `ranks` devices.

    Small messages scatter by their own size; the closest series that grows with the bytes is what is told.
    """
    with tempfile.TemporaryDirectory() as folder:
        start_processes(  # type: ignore[no-untyped-call]
            _rank, (ranks, device.type, sizes, folder), nprocs=ranks, start_method="spawn"
        )
        rows = json.loads((Path(folder) / "rows").read_text("utf-8"))
    found: dict[str, dict[Coordinates, Timing]] = {}
    for name in OPERATIONS:
        mine = [(size, seconds, spread) for operation, size, seconds, spread in rows if operation == name]
        growing = np.exp(isotonic_regression(np.log([seconds for _, seconds, _ in mine])).x)
        found[f"{name}_node"] = {
            (ranks, size): Timing(float(seconds), spread)
            for (size, _, spread), seconds in zip(mine, growing, strict=True)
        }
    return found


def _rank(rank: int, ranks: int, kind: str, sizes: tuple[int, ...], folder: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+_tensor. is deprecated")
    device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(str(Path(folder) / "store"), ranks)  # type: ignore[attr-defined]
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=2))
    rows = [(name, size, *_time(name, size, ranks, device)) for name in OPERATIONS for size in sizes]
    if rank == 0:
        (Path(folder) / "rows").write_text(json.dumps(rows), "utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _time(name: str, size: int, ranks: int, device: torch.device) -> tuple[float, float]:
    """Seconds of the slowest rank that the operation adds to a stream of kernels, median, and the spread.

    Calls consist of such streams. After a barrier, one operation alone takes a fraction of that where threads wait
    for each other: gloo's all-reduce of 64 KiB between two cores took 0.5 ms alone and 1.1 to 3.1 ms in streams.
    """
    run, kernel = _operation(name, size // 4, ranks, device), _kernel(device)
    length = LONG_STREAM if size >= 64 * MIB and device.type == "cpu" else STREAM
    plain: list[float] = []
    mixed: list[float] = []
    for _ in range(WARM_UPS + STREAMS):
        plain.append(_stream([kernel], length, device))
        mixed.append(_stream([kernel, run], length, device))
    base = summary(plain[WARM_UPS:]).seconds
    timing = summary([max(seconds - base, 0.1 * seconds) for seconds in mixed[WARM_UPS:]])
    return timing.seconds, timing.spread


def _stream(parts: list[Callable[[], Any]], length: int, device: torch.device) -> float:
    """Seconds of the slowest rank for one round of the parts, out of `length` rounds."""
    dist.barrier()
    _wait(device)
    began = time.perf_counter()
    for _ in range(length):
        for part in parts:
            part()
    _wait(device)
    slowest = torch.tensor([time.perf_counter() - began], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest) / length


def _kernel(device: torch.device) -> Callable[[], Any]:
    """A product of some tenths of a millisecond."""
    extent = KERNEL_EXTENTS[device.type]
    factor = torch.ones(extent, extent, device=device)
    return lambda: factor @ factor


def _operation(name: str, elements: int, ranks: int, device: torch.device) -> Callable[[], Any]:
    whole = torch.ones(elements, device=device)
    part = torch.ones(elements // ranks, device=device)
    if name == "all_reduce":
        return lambda: dist.all_reduce(whole)
    if name == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part)
    if name == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole)
    rank = dist.get_rank()
    if rank > 1:
        return lambda: None
    return (lambda: dist.send(whole, 1)) if rank == 0 else (lambda: dist.recv(whole, 0))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
