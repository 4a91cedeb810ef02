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

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from profiler.results import Coordinates
from profiler.timers import WARM_UPS, Timing, summary

KIB, MIB = 2**10, 2**20
CPU_BYTES = (4 * KIB, 64 * KIB, MIB, 16 * MIB, 128 * MIB)
GPU_BYTES = (64 * KIB, MIB, 16 * MIB, 256 * MIB)
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "send_recv")


def device_count(device: torch.device) -> int:
    """Devices of this machine that can talk to each other; of a CPU the cores, at most eight."""
    return torch.cuda.device_count() if device.type == "cuda" else min(os.cpu_count() or 1, 8)


def measure_collectives(
    device: torch.device, ranks: int, sizes: tuple[int, ...]
) -> dict[str, dict[Coordinates, Timing]]:
    """Entry name (`all_reduce_node`) -> (ranks, bytes of the whole vector) -> time, between `ranks` devices."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(  # type: ignore[no-untyped-call]
            _rank, (ranks, device.type, sizes, folder), nprocs=ranks, start_method="spawn"
        )
        rows = json.loads((Path(folder) / "rows").read_text())
    found: dict[str, dict[Coordinates, Timing]] = {}
    for name, size, seconds, spread in rows:
        found.setdefault(f"{name}_node", {})[ranks, size] = Timing(seconds, spread)
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
        (Path(folder) / "rows").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def _time(name: str, size: int, ranks: int, device: torch.device) -> tuple[float, float]:
    """Median seconds of the slowest rank, and the spread."""
    run = _operation(name, size // 4, ranks, device)
    repeats = 4 if size >= 64 * MIB and device.type == "cpu" else 20
    samples: list[float] = []
    for _ in range(repeats + WARM_UPS):
        dist.barrier()
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        slowest = torch.tensor([time.perf_counter() - began], device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        samples.append(float(slowest))
    timing = summary(samples[WARM_UPS:])
    return timing.seconds, timing.spread


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
