"""The doctor on a faked listing of an 8-GPU node, on a bare machine, and on this one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from planner.cli.app import app
from planner.doctor.command import doctor_command
from planner.doctor.facts import gather
from planner.doctor.findings import MEGATRON_VERSION, findings

GPU = "NVIDIA H100 80GB HBM3, 81559, {used}, 580.159.04, 1980, 2619, 5, 16, 700.00, {mig}, 9.0, Enabled, Default"
HEADER = "\t" + "\t".join(f"GPU{i}" for i in range(8)) + "\tNIC0\tCPU Affinity\tNUMA Affinity"
PACKAGES = {
    "torch": "2.11.0+cu130", "megatron-core": "0.16.1", "safetensors": "0.8.0", "tokenizers": "0.23.3",
    "ortools": "9.15.6755", "numba": "0.68.1",
}  # fmt: skip


def topology(link: str) -> str:
    rows = [f"GPU{i}\t" + "\t".join(" X " if i == j else link for j in range(8)) + "\tPXB\t0-51\t0" for i in range(8)]
    return "\n".join([HEADER, *rows, "NIC0\t" + "PXB\t" * 8 + " X ", "", "Legend:", "  X    = Self"])


@dataclass(frozen=True)
class Fake:
    """A machine that answers what it is told to."""

    programs: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    shared: int = 2**40

    def run(self, *words: str) -> str:
        line = " ".join(words)
        return next((text for name, text in self.programs.items() if line.startswith(name)), "")

    def read(self, path: str) -> str:
        return self.files.get(path, "")

    def package(self, name: str) -> str:
        return self.packages.get(name, "")

    def free_bytes(self, path: str) -> int:
        return self.shared if path == "/dev/shm" else 0

    def can_listen(self, address: str) -> bool:
        return address == "127.0.0.1"


NODE = Fake(
    programs={
        "nvidia-smi --query-gpu": "\n".join(GPU.format(used=4, mig="Disabled") for _ in range(8)),
        "nvidia-smi topo": topology("NV18"),
        "python3 --version": "Python 3.12.3\n",
        "ibv_devices": "    device          node GUID\n    ------          ----\n    mlx5_0          a088c2\n",
        "sinfo --version": "slurm 24.11.1\n",
        "sinfo -h": "16 gpu:h100:8\n2 (null)\n",
    },
    files={
        "/proc/meminfo": "MemTotal: 2113929216 kB\nMemAvailable: 2000000000 kB\n"
        "HugePages_Total: 512\nHugepagesize: 2048 kB\n",
        "/proc/cpuinfo": "".join(f"processor : {i}\nmodel name : Intel(R) Xeon(R) 8480C\n" for i in range(104)),
        "/sys/devices/system/node/online": "0-1\n",
        "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "/proc/self/limits": "Max locked memory         unlimited            unlimited            bytes\n"
        "Max open files            1048576              1048576              files\n",
        "/proc/net/route": "Iface\tDestination\neth0\t00000000\nlo\t0000007F\nib0\t0000000A\n",
    },
    packages=PACKAGES,
)


def levels(fake: Fake) -> dict[tuple[str, str], str]:
    return {(one.subject, one.level): f"{one.text} | {one.hint}" for one in findings(gather(fake))}


def test_an_eight_gpu_node() -> None:
    facts = gather(NODE)
    assert len(facts.gpus) == 8 and facts.gpus[0].memory_gib == pytest.approx(79.65, abs=0.01)
    assert facts.links == {"NVLink x 18": 28}  # every pair of eight
    assert facts.fabric == ("mlx5_0",) and facts.network == ("eth0", "ib0")
    assert facts.cores == 104 and facts.numa_nodes == 2 and facts.huge_pages_gib == 1.0
    assert facts.slurm_gpus == "16 nodes with gpu:h100:8"
    found = levels(NODE)
    assert not [subject for subject, level in found if level == "lacks"]
    assert "8 x NVIDIA H100 80GB HBM3, 79.6 GiB, driver 580.159.04, PCIe gen 5 x16" in found["gpu", "ok"]
    assert "up to 8 GPUs" in found["realrun", "ok"]
    assert "28 pairs by NVLink x 18" in found["links", "ok"]


@pytest.mark.parametrize(
    ("change", "subject", "level", "says"),
    [
        ({"shared": 64 * 2**20}, "shared memory", "lacks", "--shm-size"),
        ({"packages": {**PACKAGES, "torch": "2.11.0+cpu"}}, "packages", "lacks", "CUDA build"),
        ({"packages": {**PACKAGES, "torch": "2.10.0"}}, "packages", "lacks", "torch>=2.11"),
        ({"packages": {**PACKAGES, "torch": "2.11.0"}}, "packages", "note", "whole rows"),
        ({"packages": {**PACKAGES, "megatron-core": "0.19.2"}}, "packages", "lacks", "megatron-core==0.16.1"),
        ({"packages": {"torch": "2.11.0"}}, "realrun", "lacks", "megatron-core, safetensors, tokenizers missing"),
        ({"environment": {"CUDA_VISIBLE_DEVICES": "0,1"}}, "gpu", "note", "'0,1' hides the others"),
        ({"programs": {**NODE.programs, "nvidia-smi topo": topology("SYS")}}, "links", "note", "28 pairs by between"),
        (
            {"programs": {**NODE.programs, "nvidia-smi --query-gpu": GPU.format(used=40960, mig="Enabled")}},
            "gpu",
            "lacks",
            "MIG",
        ),
        (
            {"files": {**NODE.files, "/proc/self/limits": "Max open files  1024  1024  files\n"}},
            "limits",
            "note",
            "4096",
        ),
    ],
)
def test_what_lacks_has_a_hint(change: dict[str, object], subject: str, level: str, says: str) -> None:
    assert says in levels(replace(NODE, **change))[subject, level]  # type: ignore[arg-type]


def test_a_bare_machine_is_no_error() -> None:
    found = levels(Fake(shared=2**34))
    assert "nvidia-smi lists none" in found["gpu", "note"]
    assert "cannot run" in found["realrun", "lacks"]


def test_the_exit_code_says_whether_something_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_command(speeds=False, as_json=True, probe=NODE) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["facts"]["gpus"]) == 8 and {one["level"] for one in answer["findings"]} <= {"ok", "note"}
    assert doctor_command(speeds=False, as_json=False, probe=Fake()) == 1
    assert "hint:" in capsys.readouterr().out


def test_this_machine() -> None:
    done = CliRunner().invoke(app, ["doctor", "--no-speeds", "--json"])
    answer = json.loads(done.stdout)
    assert answer["facts"]["cores"] >= 1 and answer["facts"]["packages"]["torch"]


def test_the_doctor_knows_the_runtime_s_megatron() -> None:
    text = (Path(__file__).parents[2] / "runtime" / "models" / "installation.py").read_text()
    assert f'VERSION = "{MEGATRON_VERSION}"' in text
