"""What the facts mean: for each subject whether a run can use it, and a hint where something is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from planner.doctor.facts import Facts
from plans.kvcache import LEAST_TORCH, PAGED_TORCH, release

Level = Literal["ok", "note", "lacks"]
RUNTIME = ("torch", "megatron-core", "safetensors", "tokenizers")
MEGATRON_VERSION = "0.16.1"
LEAST_OPEN_FILES = 4096
IDLE_GIB = 1.0
"""A GPU with more memory in use than this is somebody's."""
SHARED_GIB = 1.0
"""Below this, NCCL's shared-memory transport and data loaders fail inside containers."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's page. level: `lacks` something that a run needs, a `note`, or `ok`."""

    subject: str
    level: Level
    text: str
    hint: str = ""


def findings(facts: Facts) -> list[Finding]:
    """All findings, in the order in which they are read."""
    parts = (_can_run, _gpus, _links, _packages, _processor, _memory, _shared, _huge, _locked, _ports, _slurm)
    return [found for part in parts for found in part(facts)]


def _can_run(facts: Facts) -> Iterator[Finding]:
    lacking = [name for name in RUNTIME if name not in facts.packages]
    if lacking:
        yield Finding("realrun", "lacks", f"cannot run: {', '.join(lacking)} missing", "pip install 'realplan[run]'")
    elif facts.gpus:
        yield Finding("realrun", "ok", f"plans for up to {len(facts.gpus)} GPUs of one node")
    else:
        yield Finding("realrun", "note", f"CPU plans of a few ranks ({facts.cores} cores)", "`--cluster local-cpu`")
    planner = [name for name in ("ortools", "numba") if name not in facts.packages]
    if planner:
        yield Finding("realplan search", "lacks", f"{', '.join(planner)} missing", "pip install realplan")
    else:
        yield Finding("realplan search", "ok", "plans for any cluster, without a GPU")


def _gpus(facts: Facts) -> Iterator[Finding]:
    if not facts.gpus:
        yield Finding("gpu", "note", "nvidia-smi lists none", "a driver, and `--gpus all` or its like in a container")
        return
    kinds = Counter((gpu.name, round(gpu.memory_gib, 1)) for gpu in facts.gpus)
    for (name, memory), count in kinds.items():
        first = next(gpu for gpu in facts.gpus if gpu.name == name)
        details = [f"{memory:g} GiB", f"driver {first.driver}", first.pcie and f"PCIe {first.pcie}"]
        details += [first.clock_mhz and f"{first.clock_mhz} MHz", first.power_w and f"{float(first.power_w):.0f} W"]
        yield Finding("gpu", "ok", f"{count} x {name}, " + ", ".join(filter(None, details)))
    if len(kinds) > 1:
        yield Finding("gpu", "note", "of several kinds", "a plan is for one kind: choose with CUDA_VISIBLE_DEVICES")
    yield from _gpu_states(facts)


def _gpu_states(facts: Facts) -> Iterator[Finding]:
    """What keeps a listed GPU from being used whole."""
    busy = [str(i) for i, gpu in enumerate(facts.gpus) if gpu.used_gib > IDLE_GIB]
    if busy:
        used = max(gpu.used_gib for gpu in facts.gpus)
        hint = "end the other process, or bound plans with `search --max-memory`"
        yield Finding("gpu", "note", f"GPU {', '.join(busy)} in use, up to {used:.0f} GiB", hint)
    if any(gpu.mig == "Enabled" for gpu in facts.gpus):
        yield Finding("gpu", "lacks", "MIG cuts some GPUs into parts", "NCCL needs whole GPUs: `nvidia-smi -mig 0`")
    if any(gpu.mode.startswith("Exclusive") for gpu in facts.gpus):
        yield Finding("gpu", "note", "compute mode is exclusive", "one process per GPU, which is what realrun starts")
    if facts.visible_devices is not None:
        yield Finding("gpu", "note", f"CUDA_VISIBLE_DEVICES={facts.visible_devices!r} hides the others")


def _links(facts: Facts) -> Iterator[Finding]:
    if len(facts.gpus) < 2:
        return
    if not facts.links:
        yield Finding("links", "note", "`nvidia-smi topo -m` says nothing", "`realplan profile` measures them")
        return
    text = ", ".join(f"{count} pairs by {kind}" for kind, count in facts.links.items())
    slow = [kind for kind in facts.links if not kind.startswith("NVLink")]
    hint = "keep tensor degrees at 1 between such pairs, or profile and pass --table" if slow else ""
    yield Finding("links", "note" if slow else "ok", text, hint)
    if facts.fabric:
        yield Finding("network", "ok", f"RDMA devices {', '.join(facts.fabric)}")


def _packages(facts: Facts) -> Iterator[Finding]:
    shown = ", ".join(f"{name} {found}" for name, found in facts.packages.items())
    yield Finding("packages", "ok", f"Python {facts.python}; {shown}")
    found = facts.packages.get("megatron-core", MEGATRON_VERSION)
    if found != MEGATRON_VERSION:
        hint = f"pip install megatron-core=={MEGATRON_VERSION}"
        yield Finding(
            "packages", "lacks", f"megatron-core is {found}, the runtime is written for {MEGATRON_VERSION}", hint
        )
    yield from _torch(facts)


def _torch(facts: Facts) -> Iterator[Finding]:
    torch = facts.packages.get("torch")
    if torch is None:
        return
    least, paged = (".".join(map(str, numbers)) for numbers in (LEAST_TORCH, PAGED_TORCH))
    if release(torch) < LEAST_TORCH:
        yield Finding(
            "packages", "lacks", f"torch is {torch}, the runtime needs {least}", f"pip install 'torch>={least}'"
        )
    elif facts.gpus and release(torch) < PAGED_TORCH:
        text = f"under torch {torch} KV caches in half precision are whole rows: slots of a plan may not fit"
        yield Finding("packages", "note", text, f"pip install 'torch>={paged}': caches in blocks, as plans are priced")
    if facts.gpus and "+cpu" in torch:
        yield Finding("packages", "lacks", "torch is built without CUDA", "install torch's CUDA build")


def _processor(facts: Facts) -> Iterator[Finding]:
    yield Finding("processor", "ok", f"{facts.cores} cores, {facts.numa_nodes} NUMA nodes, {facts.processor}")
    if facts.gpus and facts.cores < 2 * len(facts.gpus):
        yield Finding("processor", "note", "less than two cores per GPU", "launches of kernels will wait for the CPU")


def _memory(facts: Facts) -> Iterator[Finding]:
    text = f"{facts.memory_gib:.0f} GiB, {facts.available_gib:.0f} available"
    device = sum(gpu.memory_gib for gpu in facts.gpus)
    if facts.memory_gib < device:
        hint = "offloading is bounded by it: say so in a cluster file, `host_memory_gib`"
        yield Finding("host memory", "note", f"{text}, less than the GPUs' {device:.0f}", hint)
    else:
        yield Finding("host memory", "ok", text)


def _shared(facts: Facts) -> Iterator[Finding]:
    level: Level = "ok" if facts.shared_memory_gib >= SHARED_GIB else "lacks"
    hint = "" if level == "ok" else "in a container: `--shm-size=16g` or `--ipc=host`"
    yield Finding("shared memory", level, f"{facts.shared_memory_gib:.1f} GiB free in /dev/shm", hint)


def _huge(facts: Facts) -> Iterator[Finding]:
    modes = facts.transparent_huge_pages or "unknown"
    text = f"{facts.huge_pages_gib:.1f} GiB reserved, transparent huge pages `{modes}`"
    hint = (
        "`echo madvise > /sys/kernel/mm/transparent_hugepage/enabled` speeds pinned buffers" if modes == "never" else ""
    )
    yield Finding("huge pages", "note" if hint else "ok", text, hint)


def _locked(facts: Facts) -> Iterator[Finding]:
    low = facts.locked_memory.isdigit() and int(facts.locked_memory) < 2**33
    if facts.fabric and low:
        yield Finding("limits", "lacks", f"locked memory {facts.locked_memory} B", "RDMA needs `ulimit -l unlimited`")
    if 0 < facts.open_files < LEAST_OPEN_FILES:
        text = f"{facts.open_files} open files"
        yield Finding("limits", "note", text, f"many ranks and shards need more: `ulimit -n {LEAST_OPEN_FILES}`")


def _ports(facts: Facts) -> Iterator[Finding]:
    if not facts.loopback:
        hint = "ranks of one machine talk over it: is `lo` up?"
        yield Finding("ports", "lacks", "no process may listen on 127.0.0.1", hint)
        return
    over = f"; between machines over {', '.join(facts.network)}" if facts.network else ""
    yield Finding("ports", "ok", f"free ports on loopback{over}")


def _slurm(facts: Facts) -> Iterator[Finding]:
    if facts.slurm:
        kinds = f", {facts.slurm_gpus}" if facts.slurm_gpus else ""
        yield Finding("slurm", "ok", f"{facts.slurm}{kinds}; `srun realrun plan.json` starts a rank per task")
    else:
        yield Finding("slurm", "note", "none", "several machines: `torchrun`, or `srun` where there is Slurm")
