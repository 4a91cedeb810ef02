"""Plans of real models for the one device, executed on random weights in a world of their own, and what they took."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check.setting import FIXTURE, Setting
from plans.algorithms import algorithm_graph
from plans.checks import check_plan
from plans.cluster import parse_mesh
from plans.errors import RealplanError
from plans.library import load_cluster, load_model
from plans.plan import ExecutionPlan, PlannedCall
from plans.runfile import RunFile
from plans.strategy import ParallelStrategy, parse_degrees
from plans.workload import Workload

MODEL = "qwen2.5-1.5b"
Settings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a run took on a rank: peak_bytes of device memory, its allocator's share of that in use at once, and seconds
    per call and of the whole step by iteration."""

    peak_bytes: float
    allocated_bytes: float
    metrics: Sequence[Mapping[str, float]]


def device_plan(
    setting: Setting, algorithm: str, sizes: Mapping[str, int], calls: Settings, *, ranks: int = 1
) -> ExecutionPlan:
    """A plan of the 1.5B shape (of the fixture in a rehearsal) for the card's kind. calls: call -> settings, with
    `degrees` where they are not those of dp; `*` for the others."""
    if setting.kind == "cuda":
        from profiler.devices import hardware_kind

        kind = hardware_kind(setting.device)
    else:
        kind = "local-cpu"
    cluster = load_cluster(kind, gpus=ranks, gpus_per_node=ranks)
    spec = load_model(str(FIXTURE) if setting.tiny else MODEL)
    graph = algorithm_graph(algorithm)
    models = {role: spec.with_value_head() if role in ("critic", "reward") else spec for role in graph.roles}
    dtype = "bf16" if setting.kind == "cuda" else "fp32"
    workload = Workload(graph=graph, models=models, dtype=dtype, **{"minibatches": 1, **sizes})
    planned = []
    for call in graph.model_calls:
        settings = dict(calls.get(call.name, calls.get("*", {})))
        degrees = settings.pop("degrees", f"d{ranks} t1 p1")
        strategy = ParallelStrategy(**parse_degrees(degrees), **settings)
        planned.append(PlannedCall(call=call.name, mesh=parse_mesh("node 0", cluster), strategy=strategy))
    plan = ExecutionPlan(workload=workload, cluster=cluster, calls=tuple(planned))
    problems = check_plan(plan)
    if problems:
        raise RealplanError(f"{algorithm}: {problems[0].message}", problems[0].hint)
    return plan


def take(device: Any, groups: Any, plan: ExecutionPlan, iterations: int, folder: Path) -> Taken:
    """Run a plan on this rank; collective over the world. Metrics are on rank 0."""
    import gc

    import torch
    import torch.distributed as dist

    from gpu_check.plays import records_of
    from runtime.executor import Executor
    from runtime.job import prepare_job
    from runtime.reports.records import Recorder
    from runtime.weights import copies

    copies.random_weights = _quick_weights
    before = _start_peak(device)
    run = RunFile.model_validate({"weights": "random", "iterations": iterations, "output": str(folder)})
    recorder = Recorder(folder, dist.get_rank(), time.time())
    executor = Executor(prepare_job(plan, run), groups, device, recorder)
    executor.run(iterations)
    peak, allocated = _peak(device, before)
    dist.barrier(group=groups.host(range(dist.get_world_size())))
    metrics = records_of(plan, folder) if dist.get_rank() == 0 else ()
    del executor
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Taken(peak_bytes=peak, allocated_bytes=allocated, metrics=metrics)


def take_alone(setting: Setting, plan: ExecutionPlan, iterations: int, folder: Path) -> Taken:
    """Run a plan of one rank in this process, which spares a card the seconds in which another one imports."""
    from profiler.alone import alone

    with alone(setting.device) as groups:
        return take(setting.device, groups, plan, iterations, folder)


def _quick_weights(model: Any, seed: int) -> None:
    """Random weights made on the device: the runtime's own, equal under every layout, take a minute of one core."""
    import torch

    from runtime.models.model import named_shards

    torch.manual_seed(seed)
    with torch.no_grad():
        for _, held in named_shards(model):
            held.normal_(0.0, 0.02) if held.dim() > 1 else held.fill_(1.0)


def _start_peak(device: Any) -> float:
    """Forget the peak so far; what to subtract from the next one."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return 0.0
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _peak(device: Any, before: float) -> tuple[float, float]:
    """Bytes of device memory at most: what the allocator held, and the context (of all processes on the card, shared
    out). On the CPU, as a stand-in, the growth of the resident set."""
    import torch
    import torch.distributed as dist

    if device.type == "cpu":
        grown = _resident("VmHWM") - before
        return grown, grown
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    context = (total - free) / dist.get_world_size() - torch.cuda.memory_reserved(device)
    held = float(torch.cuda.max_memory_reserved(device))
    return held + context, float(torch.cuda.max_memory_allocated(device)) + context


def _resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024.0 * float(line.split()[1])
    return 0.0
