"""Runs as people start them under other launchers: torchrun, and srun on one node and on two.

Each gives the metrics of `realrun` alone, bit for bit, and leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from plan_cases import tiny_plan
from run_cases import PATIENCE_S, arguments, outcome
from slurm import slurm
from warm import run_warm

from runtime.launching.on_ray import carried
from runtime.reports.records import read_status

PLAN = tiny_plan(2, "d2 t1 p1")
SCRIPTS = Path(sys.executable).parent
Metrics = list[dict[str, Any]]


REALRUN = [str(SCRIPTS / "realrun")]
WARM = [sys.executable, str(Path(__file__).parents[1] / "warm_realrun.py")]
"""The same where another test has shown that the command itself starts, without ten seconds of imports."""


def trained(
    folder: Path,
    launcher: Sequence[str],
    environment: Mapping[str, str] | None = None,
    iterations: int = 1,
    realrun: Sequence[str] = REALRUN,
) -> Metrics:
    """Metrics of a run, as far as they do not depend on time."""
    keys: dict[str, Any] = {"iterations": iterations, "export": False, "checkpoint": {"every": 1}}
    *code, plan, run, file = arguments(folder, plan=PLAN, **keys)
    threads = {"OMP_NUM_THREADS": "1"}  # rounding depends on their number, and each launcher has its own
    env = {**(environment or os.environ), **threads}
    if launcher:
        command = [*launcher, *realrun, plan, run, file]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S)
    else:
        done = run_warm([*code, plan, run, file], PATIENCE_S, env)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    left = [path.name for path in (folder / "out").rglob(".*")] + [p.name for p in folder.glob("pytest-errorfile*")]
    assert not left
    return learnt(folder / "out")


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
        for nodes, more, realrun in (("1", {}, REALRUN), ("2", _address(), WARM)):
            (tmp_path / nodes).mkdir()
            launcher = ["srun", "-N", nodes, "-n", "2"]
            found = trained(tmp_path / nodes, launcher, {**environment, **more}, realrun=realrun)
            assert found == alone, f"{nodes} nodes"
        # A job that slurm has started again: what was done is not done again, and the rest is.
        again = {**environment, **_address(), "SLURM_RESTART_COUNT": "1"}
        found = trained(tmp_path / "2", ["srun", "-N", "2", "-n", "2"], again, iterations=2, realrun=WARM)
        assert found[:1] == alone and [line["iteration"] for line in found] == [0, 1]
        steps = sorted(path.name for path in (tmp_path / "2" / "out" / "checkpoints").glob("global_step_*"))
        assert steps == ["global_step_1", "global_step_2"]


def test_a_killed_rank_of_a_slurm_job_is_started_again(tmp_path: Path) -> None:
    """One realrun per machine, two ranks each: the step goes on, from the newest checkpoint, as if nothing had been."""
    keys: dict[str, Any] = {
        "iterations": 4, "export": False, "report": False, "checkpoint": {"every": 1}, "restarts": 2
    }  # fmt: skip
    (tmp_path / "alone").mkdir()
    command = arguments(tmp_path / "alone", plan=tiny_plan(4, "d4 t1 p1"), **keys)
    assert outcome(command).returncode == 0
    *_, plan, run, file = arguments(tmp_path, plan=tiny_plan(4, "d4 t1 p1", nodes=2), **keys)
    step = ["srun", "-N", "2", "--ntasks-per-node", "1", *WARM, plan, run, file]
    with slurm() as environment:
        env = {**environment, **_address(), "OMP_NUM_THREADS": "1"}
        job = subprocess.Popen(step, env=env, cwd=tmp_path, text=True, stdout=subprocess.DEVNULL, stderr=-1)
        try:
            end = time.monotonic() + PATIENCE_S
            while (rank := read_status(tmp_path / "out" / ".ranks", 3)) is None or rank.iteration < 2:
                assert job.poll() is None and time.monotonic() < end, job.communicate(timeout=5)[1]
                time.sleep(0.05)
            os.kill(rank.pid, signal.SIGKILL)
            _, said = job.communicate(timeout=PATIENCE_S)
        finally:
            job.kill()
    assert job.returncode == 0 and "Traceback" not in said, said
    assert "rank 3 was killed by SIGKILL" in said and "restart 1 of 2" in said and "going on from" in said, said
    assert learnt(tmp_path / "out") == learnt(tmp_path / "alone" / "out")


def learnt(output: Path) -> Metrics:
    """Metrics of a run, as far as they do not depend on time."""
    apart = ("timing_s/", "perf/", "plan/")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(apart)} for line in lines]


def _address() -> dict[str, str]:
    """This machine beyond loopback, for nodes whose names nobody resolves."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return {"MASTER_ADDR": probe.getsockname()[0]}


def test_what_goes_along_to_the_machines_of_a_ray_cluster() -> None:
    mine = {"NCCL_SOCKET_IFNAME": "ib0", "WANDB_API_KEY": "x", "OMP_NUM_THREADS": "1", "PATH": "/bin", "HOME": "/root"}
    assert list(carried(mine)) == ["NCCL_SOCKET_IFNAME", "WANDB_API_KEY", "OMP_NUM_THREADS"]
