"""Ranks that `srun` has started, in the words of torchrun."""

from __future__ import annotations

import re
from collections.abc import Mapping

from plans.errors import RealplanError
from plans.problems import shortened

FIRST_PORT, PORTS = 15000, 10000
LOOPBACK = "127.0.0.1"
_HINT = "srun sets these; unset SLURM_STEP_NUM_TASKS, and realrun starts the ranks of one machine itself"


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task of `srun`, without those that are set.

    Nothing under torchrun, outside srun, or where srun has started one task, which then starts ranks itself. A batch
    script has SLURM_PROCID as well; SLURM_STEP_NUM_TASKS is set by srun alone. Rank 0 is on the first node, and
    on loopback where there is one node. Raises RealplanError for variables that srun does not set so.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or tasks == "1":
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_STEP_ID"):
        said = environment.get(name, "" if name in ("SLURM_PROCID", "SLURM_LOCALID") else "0")
        if not re.fullmatch(r"[0-9]{1,9}", said):
            raise RealplanError(f"the environment has {name}={shortened(repr(said))}, not a number", _HINT)
    if not re.match(r"[\w.-]", nodes):
        raise RealplanError(
            f"the environment has SLURM_STEP_NODELIST={shortened(repr(nodes))}, not a list of hosts", _HINT
        )
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    found = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": tasks,
        "MASTER_ADDR": LOOPBACK if environment.get("SLURM_STEP_NUM_NODES") == "1" else first_host(nodes),
        "MASTER_PORT": str(FIRST_PORT + (job * 7 + step) % PORTS),
    }
    return {name: value for name, value in found.items() if name not in environment}


def first_host(nodes: str) -> str:
    """The first host of SLURM's list, such as `gpu017` of `gpu[017-020,033],login1`."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]
