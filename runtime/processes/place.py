"""Which machine of a run this one is, and where the first one is found. Light: no torch."""

from __future__ import annotations

from dataclasses import dataclass

from plans.errors import RealplanError
from plans.plan import ExecutionPlan
from runtime.processes.member import Address, Member

PORT = 29500


@dataclass(frozen=True, slots=True)
class Place:
    """A machine of a run: its node of the plan, and where the machine of node 0 listens."""

    node: int
    first: Address


def place_of(
    plan: ExecutionPlan, member: Member | None, node: int | None, host: str | None, port: int | None
) -> Place | None:
    """The machine that the command line (`--node-rank`, `--master-addr`, `--master-port`) makes of this one, or another
    launcher that has started one process per machine; None where this process is a rank, or the only machine.

    Raises RealplanError for half of an address and for a node that the plan has not.
    """
    nodes = plan.cluster.nodes
    if node is None and host is None:
        meeting = None if member is None else member.meeting
        per_machine = member is not None and member.world == nodes != plan.cluster.size
        if member is None or not per_machine or not isinstance(meeting, Address) or meeting.served or nodes == 1:
            return None
        return Place(member.rank, meeting)
    if node is None or host is None:
        raise RealplanError(
            "--node-rank and --master-addr go together: which machine this is, and the address of that of node 0",
            "realrun plan.json --node-rank 0 --master-addr HOST0",
        )
    if not 0 <= node < nodes:
        raise RealplanError(
            f"--node-rank {node}: the plan has {nodes} node{'s' * (nodes > 1)}",
            f"--node-rank 0 to {nodes - 1}, a machine each" if nodes > 1 else "realrun without --node-rank",
        )
    return Place(node, Address(host, PORT if port is None else port, alone=nodes == 1, kept=True))
