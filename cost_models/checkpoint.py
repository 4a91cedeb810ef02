"""What a checkpoint costs a run: the time for which training stands still, and what goes to the disk."""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.engines.engine import Engine
from plans.checkpoint import parameters_of, written
from plans.layout import Layout
from plans.plan import ExecutionPlan

STATE_BYTES = 12
"""Of a trained parameter: float32 master and both of Adam's moments."""


@dataclass(frozen=True, slots=True)
class CheckpointCost:
    """One checkpoint of a plan. bytes: of all ranks; rank_bytes: of the rank that writes most. copy_s: seconds that its
    iteration is longer, in which that rank copies its part to host memory; the files are written beside the training,
    and cost time only where the next checkpoint comes before they are."""

    bytes: float
    rank_bytes: float
    copy_s: float


def checkpoint_cost(plan: ExecutionPlan, engine: Engine) -> CheckpointCost:
    """The cost of one checkpoint: bytes by `plans.checkpoint.written`, at the speed between a GPU and its host."""
    total, by_rank = 0.0, dict[int, float]()
    for role, call in plan.workload.graph.trainers.items():
        layout = plan.layout(call)
        total += STATE_BYTES * sum(p.size for p in parameters_of(plan.workload.models[role]).values())
        most = _most(layout)
        for rank in layout.ranks:
            by_rank[rank] = by_rank.get(rank, 0.0) + most
    rank_bytes = max(by_rank.values(), default=0.0)
    machine = engine.on(plan.cluster, plan.workload.dtype)
    return CheckpointCost(total, rank_bytes, rank_bytes / machine.host_bytes_per_s)


def _most(layout: Layout) -> float:
    """Bytes that the busiest rank of a layout writes; its replicas write about as much; one is looked at."""
    first = [rank for rank, place in layout.places.items() if place.dp == 0 and place.cp == 0]
    return STATE_BYTES * max(sum(entry.size for entry in written(layout, rank)) for rank in first)
