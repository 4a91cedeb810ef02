"""The device that is profiled: its kind, its driver's name for it, clocks and versions of what runs on it."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from plans.errors import RealplanError
from plans.library import gpu_names

_MEMORY = re.compile(r"\d+gb")
_CLOCKS = {"graphics": "clocks.max.graphics", "memory": "clocks.max.memory", "graphics_now": "clocks.current.graphics"}


def parse_device(name: str) -> torch.device:
    """`cuda` (the first GPU) or `cpu`."""
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise RealplanError(f"device `{name}` is unknown", "--device cuda or --device cpu")
    if not torch.cuda.is_available():
        raise RealplanError("torch finds no CUDA device", "--device cpu, or a torch build with CUDA on a GPU machine")
    return torch.device("cuda", 0)


def device_name(device: torch.device) -> str:
    """The driver's name of a GPU; the processor's model name of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1].strip() if found else "cpu"


def hardware_kind(device: torch.device) -> str:
    """The entry of `realplan clusters` that a device belongs to."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device)
    kind = kind_named(name)
    if kind is None:
        raise RealplanError(f"GPU `{name}` is of no known kind", f"known kinds: {', '.join(gpu_names())}")
    return kind


def kind_named(name: str) -> str | None:
    """The GPU kind that a driver's name is of: `NVIDIA H100 80GB HBM3` has the words of `h100-80gb-sxm`.

    Drivers leave out the memory of many kinds and the form of the usual one, so those words may be missing; another
    memory may not stand in their place. Of several kinds the one with most words of the name, None where two are equal.
    """
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    sized = any(_MEMORY.fullmatch(word) for word in words)
    shared = {}
    for kind in gpu_names():
        parts = [p for p in kind.split("-") if p != "sxm" and (sized or not _MEMORY.fullmatch(p))]
        if words.issuperset(parts):
            shared[kind] = len(parts)
    best = [kind for kind, count in shared.items() if count == max(shared.values())]
    return best[0] if len(best) == 1 else None


def clocks_mhz(device: torch.device) -> dict[str, float]:
    """Clock rates: of a GPU as nvidia-smi reports them, of a CPU as the kernel does; empty where nobody knows."""
    if device.type == "cpu":
        rates = [float(rate) for rate in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", _read(Path("/proc/cpuinfo")), re.M)]
        return {"core": max(rates)} if rates else {}
    query = ["nvidia-smi", f"--query-gpu={','.join(_CLOCKS.values())}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    found = [re.fullmatch(r"\s*([\d.]+)\s*", part) for part in text.strip().split(",")]
    return {name: float(match[1]) for name, match in zip(_CLOCKS, found, strict=False) if match}


def driver_version(device: torch.device) -> str:
    """Version of the GPU's driver as nvidia-smi reports it; empty where nobody knows, and of a CPU."""
    if device.type == "cpu":
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def versions(device: torch.device) -> dict[str, str]:
    """Versions of what the operations run on."""
    found = {"torch": str(torch.__version__)}
    try:
        found["megatron-core"] = version("megatron-core")
    except PackageNotFoundError:
        from runtime.models.mcore import __version__

        found["megatron-core"] = __version__
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError:
        return ""
