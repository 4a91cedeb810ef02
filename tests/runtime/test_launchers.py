"""Runs as people start them under other launchers: torchrun, and srun on one node and on two.

Each gives the metrics of `realrun` alone, bit for bit, and leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from plan_cases import tiny_plan
from run_cases import PATIENCE_S, arguments
from slurm import slurm

PLAN = tiny_plan(2, "d2 t1 p1")
SCRIPTS = Path(sys.executable).parent
Metrics = list[dict[str, Any]]


def trained(
    folder: Path, launcher: Sequence[str], environment: Mapping[str, str] | None = None, iterations: int = 1
) -> Metrics:
    """Metrics of a run, as far as they do not depend on time."""
    keys: dict[str, Any] = {"iterations": iterations, "export": False, "checkpoint": {"every": 1}}
    *_, plan, run, file = arguments(folder, plan=PLAN, **keys)
    command = [*launcher, str(SCRIPTS / "realrun"), plan, run, file]
    threads = {"OMP_NUM_THREADS": "1"}  # rounding depends on their number, and each launcher has its own
    env = {**(environment or os.environ), **threads}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    left = [path.name for path in (folder / "out").rglob(".*")] + [p.name for p in folder.glob("pytest-errorfile*")]
    assert not left
    apart = ("timing_s/", "perf/", "plan/")
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(apart)} for line in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Metrics:
    """What `realrun` learns by itself."""
    return trained(tmp_path_factory.mktemp("alone"), [])


def test_torchrun(tmp_path: Path, alone: Metrics) -> None:
    """What follows `--` is realrun's: torchrun would take `--run` for a beginning of its own options."""
    torchrun = [str(SCRIPTS / "torchrun"), "--standalone", "--nproc-per-node", "2", "--no-python", "--"]
    assert trained(tmp_path, torchrun) == alone


def test_srun(tmp_path: Path, alone: Metrics) -> None:
    with slurm() as environment:
        for nodes, more in (("1", {}), ("2", _address())):
            (tmp_path / nodes).mkdir()
            found = trained(tmp_path / nodes, ["srun", "-N", nodes, "-n", "2"], {**environment, **more})
            assert found == alone, f"{nodes} nodes"
        # A job that slurm has started again: what was done is not done again, and the rest is.
        again = {**environment, **_address(), "SLURM_RESTART_COUNT": "1"}
        found = trained(tmp_path / "2", ["srun", "-N", "2", "-n", "2"], again, iterations=2)
        assert found[:1] == alone and [line["iteration"] for line in found] == [0, 1]
        steps = sorted(path.name for path in (tmp_path / "2" / "out" / "checkpoints").glob("global_step_*"))
        assert steps == ["global_step_1", "global_step_2"]


def _address() -> dict[str, str]:
    """This machine beyond loopback, for nodes whose names nobody resolves."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return {"MASTER_ADDR": probe.getsockname()[0]}
