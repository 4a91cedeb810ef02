"""Runs on a Ray cluster, whose machines are raylets on this one. Skipped where Ray is not installed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plan_cases import tiny_plan
from run_cases import PATIENCE_S, arguments, fails, outcome, running

pytest.importorskip("ray")
from ray.cluster_utils import Cluster

TWO = tiny_plan(2, "d2 t1 p1", nodes=2)
KEYS: dict[str, Any] = {"iterations": 4, "export": False, "report": False, "checkpoint": {"every": 1}, "restarts": 2}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two machines with two CPUs each."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a socket's address has 107 characters
    (folder / "ray").mkdir()
    small = {"num_cpus": 2, "object_store_memory": 100_000_000}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("RAY_worker_niceness", "0")  # 15 otherwise, which is slow on a busy machine
        cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        try:
            cluster.add_node(**small)
            yield str(cluster.address)
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def learnt(output: Path) -> list[dict[str, float]]:
    """Metrics without those of time and memory."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    apart = ("timing_s/", "perf/", "plan/")
    return [{key: value for key, value in line.items() if not key.startswith(apart)} for line in lines]


def undisturbed(folder: Path) -> list[dict[str, float]]:
    """What the run learns without Ray, on one machine."""
    done = outcome(arguments(folder, plan=tiny_plan(2, "d2 t1 p1"), **KEYS))
    assert done.returncode == 0, done.stderr
    return learnt(folder / "out")


def test_a_killed_rank_is_started_again_from_the_newest_checkpoint(tmp_path: Path, address: str) -> None:
    """Each of two machines has a bundle of the placement group and one rank in it."""
    (tmp_path / "alone").mkdir()
    wanted = undisturbed(tmp_path / "alone")
    command = arguments(tmp_path, "--ray", address, plan=TWO, **KEYS)
    with running(command, tmp_path / "out" / ".ranks", iteration=2) as (process, ranks):
        os.kill(ranks[1].pid, signal.SIGKILL)
        said = "".join(process.communicate(timeout=PATIENCE_S))
    assert process.returncode == 0 and "Traceback" not in said, said
    assert "rank 1 was killed by SIGKILL" in said and "restart 1 of 2" in said and "going on from" in said
    assert learnt(tmp_path / "out") == wanted
    assert not list((tmp_path / "out").rglob(".*"))


def test_a_cluster_without_room_or_none_is_said(tmp_path: Path, address: str) -> None:
    large = tiny_plan(4, "d4 t1 p1")
    command = arguments(tmp_path, "--ray", address, plan=large, **KEYS)
    command[2] = "import runtime.launching.on_ray as r; r.run_on_ray.__defaults__ = (1.0,); " + command[2]
    said = fails(command)
    assert "no room within 1 s for 1 x 4 CPUs" in said and "hint:" in said, said
    assert "no Ray cluster at `127.0.0.1:1`" in fails(arguments(tmp_path, "--ray", "127.0.0.1:1", plan=TWO, **KEYS))
