"""Timers: warm up, repeat, take the median; what one operation costs, and how far its repeats spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARM_UPS = 2
MIN_REPEATS = 3
MAX_REPEATS = 50


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Timed:
    """An operation to time: `run(prepare())`, of which only `run` counts, which does it `times` times."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = _nothing
    times: int = 1


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds of the repeats, and (p90 - p10) / median."""

    seconds: float
    spread: float


def summary(samples: list[float]) -> Timing:
    """Median and spread of repeated measurements, seconds."""
    median = statistics.median(samples)
    tenths = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else [median]
    return Timing(median, (tenths[-1] - tenths[0]) / median if median else 0.0)


def measure(timed: Timed, device: torch.device, budget_s: float) -> Timing:
    """Repeat an operation for about `budget_s` seconds, at least `MIN_REPEATS` times.

    CUDA: events around the operation on an idle device, so that launch time counts where it exceeds the device's.
    CPU: processor time of this process, so that other processes of the machine count as little as can be.
    """
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    began = time.perf_counter()
    for _ in range(WARM_UPS):
        clock(timed, device)
        if time.perf_counter() - began > budget_s:
            break
    samples: list[float] = []
    began = time.perf_counter()
    while len(samples) < MAX_REPEATS and (len(samples) < MIN_REPEATS or time.perf_counter() - began < budget_s):
        samples.append(clock(timed, device))
    return summary([sample / timed.times for sample in samples])


def _cpu_seconds(timed: Timed, _: torch.device) -> float:
    given = timed.prepare()
    began = time.process_time()
    timed.run(given)
    return time.process_time() - began


def _cuda_seconds(timed: Timed, device: torch.device) -> float:
    given = timed.prepare()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    start.record()
    timed.run(given)
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1e3


def peak_bytes(timed: Timed, device: torch.device) -> float:
    """Bytes that an operation needs beyond what was allocated before it.

    CUDA: the allocator's peak. CPU: the tensors that it saves for its backward pass, parameters left out.
    """
    if device.type == "cuda":
        given = timed.prepare()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        timed.run(given)
        return float(torch.cuda.max_memory_allocated(device) - before)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = timed.run(timed.prepare())
    del result
    return float(sum(saved.values()))
