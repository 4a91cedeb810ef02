"""Ranks that `srun` has started, in the words of torchrun."""

from __future__ import annotations

import re
from collections.abc import Mapping

FIRST_PORT, PORTS = 15000, 10000


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task of `srun`, without those that are set.

    Nothing under torchrun, outside srun, or where srun has started one task, which then starts ranks itself. A batch
    script has SLURM_PROCID as well; SLURM_STEP_NUM_TASKS is set by srun alone. Rank 0 is on the first node.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or tasks == "1":
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    found = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": tasks,
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(FIRST_PORT + (job * 7 + step) % PORTS),
    }
    return {name: value for name, value in found.items() if name not in environment}


def first_host(nodes: str) -> str:
    """The first host of SLURM's list, such as `gpu017` of `gpu[017-020,033],login1`."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]
