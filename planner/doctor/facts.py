"""Facts of a machine, read from what its system says: no GPU library is imported and nothing is changed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.doctor.probe import Probe, numbers
from plans.cluster import GIB, MIB
from plans.host_memory import host_memory

GPU_FIELDS = (
    "name", "memory.total", "memory.used", "driver_version", "clocks.max.sm", "clocks.max.memory",
    "pcie.link.gen.current", "pcie.link.width.current", "power.limit", "mig.mode.current", "compute_cap",
    "ecc.mode.current", "compute_mode",
)  # fmt: skip
PACKAGES = (
    "torch", "megatron-core", "safetensors", "tokenizers", "transformers", "numpy", "scipy", "ortools", "numba",
    "pydantic", "networkx", "nvidia-ml-py",
)  # fmt: skip
LINKS = {"NV": "NVLink", "PIX": "PCIe switch", "PXB": "PCIe switches", "PHB": "PCIe host bridge", "NODE": "NUMA node",
         "SYS": "between sockets"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as nvidia-smi lists it. Memory in GiB, clocks in MHz; fields that the driver does not tell are empty."""

    name: str
    memory_gib: float
    used_gib: float
    driver: str
    clock_mhz: str
    memory_clock_mhz: str
    pcie: str
    power_w: str
    mig: str
    compute: str
    ecc: str
    mode: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a machine has. Sizes in GiB; links: pairs of GPUs by kind of link; network: interfaces that are up."""

    python: str
    cores: int
    processor: str
    numa_nodes: int
    memory_gib: float
    available_gib: float
    shared_memory_gib: float
    huge_pages_gib: float
    transparent_huge_pages: str
    locked_memory: str
    open_files: int
    loopback: bool
    gpus: tuple[Gpu, ...] = ()
    links: Mapping[str, int] = field(default_factory=dict)
    fabric: tuple[str, ...] = ()
    network: tuple[str, ...] = ()
    packages: Mapping[str, str] = field(default_factory=dict)
    slurm: str = ""
    slurm_gpus: str = ""
    visible_devices: str | None = None


def gather(probe: Probe) -> Facts:
    """Look at a machine."""
    memory, host = _meminfo(probe.read("/proc/meminfo")), host_memory(probe.read)
    limits = probe.read("/proc/self/limits")
    pages = memory.get("HugePages_Total", 0) * memory.get("Hugepagesize", 0) / MIB
    return Facts(
        python=probe.run("python3", "--version").strip().removeprefix("Python "),
        cores=len(re.findall(r"^processor\s*:", probe.read("/proc/cpuinfo"), re.M)),
        processor=_first(r"^model name\s*:\s*(.+)$", probe.read("/proc/cpuinfo")),
        numa_nodes=_count(probe.read("/sys/devices/system/node/online").strip()),
        memory_gib=host.total / GIB if host else 0.0,
        available_gib=host.available / GIB if host else 0.0,
        shared_memory_gib=probe.free_bytes("/dev/shm") / GIB,
        huge_pages_gib=pages,
        transparent_huge_pages=_first(r"\[(\w+)\]", probe.read("/sys/kernel/mm/transparent_hugepage/enabled")),
        locked_memory=_first(r"^Max locked memory\s+(\S+)", limits),
        open_files=int(_first(r"^Max open files\s+(\d+)", limits) or 0),
        loopback=probe.can_listen("127.0.0.1"),
        gpus=_gpus(probe),
        links=_links(probe.run("nvidia-smi", "topo", "-m")),
        fabric=tuple(
            sorted(set(re.findall(r"^\s*(mlx\w+|bnxt_re\w+|efa\w*|hfi1_\w+)", probe.run("ibv_devices"), re.M)))
        ),
        network=_interfaces(probe.read("/proc/net/route")),
        packages={name: found for name in PACKAGES if (found := probe.package(name))},
        slurm=probe.run("sinfo", "--version").strip(),
        slurm_gpus=_slurm_gpus(probe.run("sinfo", "-h", "-o", "%D %G")),
        visible_devices=probe.environment.get("CUDA_VISIBLE_DEVICES"),
    )


def _gpus(probe: Probe) -> tuple[Gpu, ...]:
    text = probe.run("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits")
    found = []
    for line in text.strip().splitlines():
        parts = [("" if part in ("[N/A]", "N/A", "[Not Supported]") else part) for part in numbers(line)]
        if len(parts) != len(GPU_FIELDS):
            continue
        name, total, used, driver, sm, memory, generation, width, power, mig, compute, ecc, mode = parts
        pcie = f"gen {generation} x{width}" if generation and width else ""
        sizes = float(total or 0) / 1024, float(used or 0) / 1024
        found.append(Gpu(name, *sizes, driver, sm, memory, pcie, power, mig, compute, ecc, mode))
    return tuple(found)


def _links(matrix: str) -> dict[str, int]:
    """Pairs of GPUs by the kind of link between them, out of `nvidia-smi topo -m`."""
    rows = [line.split() for line in re.sub(r"\x1b\[\w+m", "", matrix).splitlines()]
    rows = [row for row in rows if len(row) > 1 and re.fullmatch(r"GPU\d+", row[0]) and not row[1].startswith("GPU")]
    kinds: Counter[str] = Counter()
    for i, row in enumerate(rows):
        for cell in row[i + 2 : len(rows) + 1]:  # the upper half: cell j + 1 is the link to GPU j
            code = "NV" if re.fullmatch(r"NV\d+", cell) else cell
            kinds[f"{LINKS.get(code, code)}{' x ' + cell[2:] if code == 'NV' else ''}"] += 1
    return dict(kinds)


def _meminfo(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+)", text, re.M)}


def _interfaces(routes: str) -> tuple[str, ...]:
    """Interfaces with a route, but for loopback."""
    rows = [line.split() for line in routes.splitlines()[1:]]
    return tuple(dict.fromkeys(row[0] for row in rows if row and row[0] != "lo"))


def _slurm_gpus(text: str) -> str:
    kinds = [line.split(maxsplit=1) for line in text.strip().splitlines()]
    return ", ".join(f"{row[0]} nodes with {row[1]}" for row in kinds if len(row) == 2 and row[1] != "(null)")


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.M)
    return found[1].strip() if found else ""


def _count(ranges: str) -> int:
    """How many numbers a list such as `0-1,3` names."""
    total = 0
    for part in filter(None, ranges.split(",")):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return total
