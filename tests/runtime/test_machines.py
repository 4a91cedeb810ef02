"""Runs over several machines: network namespaces with addresses of their own, one of which is cut off."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from machines import Machine, machines
from plan_cases import tiny_plan
from run_cases import PATIENCE_S, ROOT, arguments

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
