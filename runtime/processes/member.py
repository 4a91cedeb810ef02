"""Which rank of an attempt a process is, and where the ranks meet. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from plans.errors import RealplanError
from plans.problems import shortened

OUTSIDE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
_HINT = "torchrun and srun set RANK and WORLD_SIZE; unset both and realrun starts the ranks of one machine itself"


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP port at which ranks of several machines meet. `served`: the launcher (torchrun) has a store there already;
    otherwise rank 0 makes one. `alone`: every rank runs on this machine, None when the launcher does not say. `job`,
    `attempt`: the launcher's name of the job, and how often it has started it again. `kept`: a realrun on each machine
    keeps the files of its ranks, so that the machines need share no folder."""

    host: str
    port: int
    served: bool = False
    alone: bool | None = None
    job: str = "0"
    attempt: int = 0
    kept: bool = False


@dataclass(frozen=True, slots=True)
class Member:
    """One rank of an attempt. local_rank: its number on its machine, None when the launcher does not say. meeting: a
    file in a private folder (one machine), or an address."""

    rank: int
    world: int
    local_rank: int | None
    meeting: Path | Address

    @property
    def ours(self) -> bool:
        """Whether realrun has started this rank: it then hears the keyboard for it, and says where the run begins."""
        return isinstance(self.meeting, Path) or self.meeting.kept

    @property
    def alone(self) -> bool:
        """Whether every rank is known to run on this machine."""
        return isinstance(self.meeting, Path) or self.meeting.alone is True


def outside_member(environment: Mapping[str, str]) -> Member | None:
    """The rank that another launcher has made of this process, told by its variables; None without them."""
    if not {"RANK", "WORLD_SIZE"} & set(environment):
        return None
    for name in OUTSIDE:
        if not environment.get(name):
            given = ", ".join(f"{other}={shortened(environment[other])}" for other in OUTSIDE if environment.get(other))
            raise RealplanError(f"the environment has {given}, but no {name}", _HINT)
    world = _number(environment, "WORLD_SIZE", 1, 2**20)
    rank = _number(environment, "RANK", 0, world - 1)
    local = _number(environment, "LOCAL_RANK", 0, world - 1) if "LOCAL_RANK" in environment else None
    return Member(rank, world, local, _address(environment, world))


def began_again(environment: Mapping[str, str]) -> bool:
    """Whether torchrun or slurm starts this process again, after a failure or because its job was requeued: the run
    goes on from its newest checkpoint."""
    return _attempt(environment) > 0


def device_index(member: Member, count: int) -> int:
    """The device of a rank among the `count` that its process sees: a launcher may show it one alone."""
    if count == 1 or (member.local_rank is None and member.world == 1):
        return 0
    if member.local_rank is None:
        raise RealplanError(f"rank {member.rank} sees {count} devices, and LOCAL_RANK does not say which is its own")
    if member.local_rank >= count:
        raise RealplanError(
            f"rank {member.rank} is number {member.local_rank} of its machine and sees {count} devices",
            "start as many ranks on a machine as it has devices",
        )
    return member.local_rank


def _address(environment: Mapping[str, str], world: int) -> Address:
    alone = None
    if "LOCAL_WORLD_SIZE" in environment:
        alone = _number(environment, "LOCAL_WORLD_SIZE", 1, world) == world
    elif "SLURM_STEP_NUM_NODES" in environment:
        alone = environment["SLURM_STEP_NUM_NODES"] == "1"
    return Address(
        host=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT", 1, 2**16 - 1),
        served=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        alone=alone,
        job=environment.get("TORCHELASTIC_RUN_ID") or environment.get("SLURM_JOB_ID") or "0",
        attempt=_attempt(environment),
    )


def _attempt(environment: Mapping[str, str]) -> int:
    """How often a launcher has started the job again."""
    said = [name for name in RESTARTS if name in environment]
    return _number(environment, said[0], 0, 2**20) if said else 0


def _number(environment: Mapping[str, str], name: str, low: int, high: int) -> int:
    text = environment[name]
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not low <= int(text) <= high:
        raise RealplanError(
            f"the environment has {name}={shortened(repr(text))}, not a number from {low} to {high}", _HINT
        )
    return int(text)
