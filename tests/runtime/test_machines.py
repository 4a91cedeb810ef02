"""Runs over several machines: network namespaces with addresses of their own, one of which is cut off or killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from machines import Machine, machines
from plan_cases import tiny_plan
from run_cases import PATIENCE_S, ROOT, arguments

from plans.codec import load_plan
from runtime.reports.records import read_status

RANKS = 3
TIMEOUT_S = 20
PLAN = tiny_plan(RANKS, "d3 t1 p1", batch_size=12)


def joined(machine: Machine, rank: int, first: Machine, command: list[str]) -> subprocess.Popen[str]:
    """A rank that is started by hand on its machine."""
    environment = {
        **os.environ, "RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": first.address, "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    words = machine.command(command)
    return subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=-1)


def test_a_machine_is_cut_off(tmp_path: Path) -> None:
    """No packet comes any more and no connection is closed: each side says within `timeout_s` whom it waited for, all
    end, and nothing is exported."""
    command = arguments(tmp_path, plan=PLAN, iterations=1000, timeout_s=TIMEOUT_S, checkpoint={"every": 1})
    with machines(RANKS) as found:
        ranks = [joined(machine, rank, found[0], command) for rank, machine in enumerate(found)]
        try:
            end, scratch = time.monotonic() + PATIENCE_S, tmp_path / "out" / ".ranks-0"
            while (status := read_status(scratch, RANKS - 1)) is None or status.iteration < 2:
                ended = next((rank for rank in ranks if rank.poll() is not None), None)
                assert ended is None, ended and ended.communicate()[1]
                assert time.monotonic() < end
                time.sleep(0.05)
            found[-1].cut()
            cut_s = time.monotonic()
            said = [rank.communicate(timeout=PATIENCE_S)[1] for rank in ranks]
            seconds = time.monotonic() - cut_s
        finally:
            for rank in ranks:
                rank.kill()
    assert all(rank.returncode == 1 for rank in ranks) and "Traceback" not in "".join(said), said
    assert seconds < 3 * TIMEOUT_S  # the iteration under way, timeout_s, and the end of the processes
    for words in said:
        assert f"longer than timeout_s = {TIMEOUT_S} s" in words or "went away" in words, words
    assert not (tmp_path / "out" / "actor").exists()
    assert (tmp_path / "out" / "checkpoints" / "latest_checkpointed_iteration.txt").exists()


Agents = list[subprocess.Popen[str]]


@contextlib.contextmanager
def agents(found: Sequence[Machine], folder: Path, *more: str, **keys: Any) -> Iterator[Agents]:
    """A realrun on each machine: the same command but for its node, folders of its own. Afterwards no process of theirs
    is left, and nothing in their folder for temporary files."""
    plan = tiny_plan(len(found), f"d{len(found)} t1 p1", nodes=len(found), batch_size=12)
    given = {"timeout_s": TIMEOUT_S, "checkpoint": {"every": 1}, "restarts": 2, "on_loss": "replan"} | keys
    temporary = tempfile.mkdtemp(prefix="rp")  # a socket's address has 107 characters
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": temporary}
    made: Agents = []
    try:
        for node, machine in enumerate(found):
            own = folder / machine.name
            own.mkdir(exist_ok=True)
            place = ["--node-rank", str(node), "--master-addr", found[0].address]
            words = machine.command(arguments(own, *place, *more, plan=plan, **given))
            made.append(subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdout=-3, stderr=-1))
        yield made
        left = [path.name for path in Path(temporary).iterdir() if not path.name.startswith("torchinductor")]
        assert not left and not _processes(temporary), left
    finally:
        for agent in made:
            agent.kill()
            agent.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def _processes(mark: str) -> list[int]:
    """Processes with a text in their environment, a while after they should have ended."""
    found, end = list[int](), time.monotonic() + 10
    while time.monotonic() < end:
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark.encode() in (place / "environ").read_bytes():
                    found.append(int(place.name))
        if not found:
            break
        time.sleep(0.1)
    return found


def _reach(agents: Agents, folder: Path, step: int) -> None:
    """Wait for a checkpoint of a machine."""
    end = time.monotonic() + PATIENCE_S
    while not (folder / "out" / "checkpoints" / f"global_step_{step}").exists():
        ended = next((agent for agent in agents if agent.poll() is not None), None)
        assert ended is None, ended and ended.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)


def _iterations(folder: Path) -> list[int]:
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["iteration"] for line in lines]


def test_a_run_goes_on_without_a_machine_that_is_cut_off(tmp_path: Path) -> None:
    """Three machines without a folder in common: two plan again and finish, the third stops and says so."""
    with machines(3) as found, agents(found, tmp_path, iterations=8) as ranks:
        folders = [tmp_path / machine.name for machine in found]
        _reach(ranks, folders[2], 2)
        found[2].cut()
        cut_s, said = time.monotonic(), ""
        while "is lost" not in said:
            said += ranks[0].stderr.readline()
        seconds = time.monotonic() - cut_s
        words = [agent.communicate(timeout=PATIENCE_S)[1] for agent in ranks]
        assert [agent.returncode for agent in ranks] == [0, 0, 1] and "Traceback" not in "".join(words), words
    assert seconds < TIMEOUT_S, said
    assert "2 of 3 devices are left" in words[0] and "going on with a plan for 2 devices" in words[0], words[0]
    assert "node 2 stops: node 0" in words[2] and "nothing was heard" in words[2], words[2]
    assert _iterations(folders[0]) == list(range(8)) and load_plan(folders[0] / "out" / "plan.json").cluster.nodes == 2
    assert (folders[0] / "out" / "actor" / "model.safetensors").exists()
    assert not any((folder / "out" / "actor").exists() for folder in folders[1:])
    for folder in folders[:2]:  # every slice on both
        step = folder / "out" / "checkpoints" / "global_step_8"
        assert {path.name for path in step.glob("rank-*")} == {"rank-00000.safetensors", "rank-00001.safetensors"}
    assert not [path for folder in folders[:2] for path in (folder / "out").rglob(".*")]
