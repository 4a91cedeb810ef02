"""Which samples a data-parallel rank handles, in which order: the arithmetic behind every transfer of a batch.

Minibatch m of a training call is the m-th block of the iteration's samples in every plan, so that the optimizer sees
the same minibatches whatever the layout; inside a block the dp ranks take contiguous runs.
"""

from __future__ import annotations

from plans.graph import CallKind
from plans.layout import Layout
from plans.plan import ExecutionPlan
from plans.workload import Workload


def dp_rows(workload: Workload, call: str, dp: int) -> tuple[tuple[int, ...], ...]:
    """Sample numbers of each dp rank of a call, in processing order."""
    kind = workload.graph.call(call).kind
    blocks = workload.minibatches if kind is CallKind.TRAIN_STEP else 1
    block = workload.samples // blocks
    share = block // dp
    return tuple(tuple(m * block + d * share + i for m in range(blocks) for i in range(share)) for d in range(dp))


def rank_rows(plan: ExecutionPlan, call: str) -> dict[int, tuple[int, ...]]:
    """Sample numbers that each rank of a call's mesh needs; a function runs on the mesh of its host call."""
    host = host_call(plan, call)
    layout = plan.layout(host)
    rows = dp_rows(plan.workload, host, layout.dp)
    return {rank: rows[layout.places[rank].dp] for rank in layout.ranks}


def host_call(plan: ExecutionPlan, call: str) -> str:
    """The model call on whose ranks a call runs (`DataflowGraph.host`)."""
    return plan.workload.graph.host(call)


def batch_transfer(plan: ExecutionPlan, producer: str, consumer: str) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """Messages that bring a producer's rows to a consumer: (source rank, target rank, samples), without what a
    target rank made itself. Every rank of a producing replica holds its rows; senders on the target's node come
    first, then the one that has sent least."""
    layout = plan.layout(host_call(plan, producer))
    made = dp_rows(plan.workload, host_call(plan, producer), layout.dp)
    replica_of = {row: replica for replica, rows in enumerate(made) for row in rows}
    replicas = _replicas(layout, plan.cluster.gpus_per_node)
    sent = dict.fromkeys(layout.ranks, 0)
    messages: list[tuple[int, int, tuple[int, ...]]] = []
    for target, needed in sorted(rank_rows(plan, consumer).items()):
        own = layout.places[target].dp if target in layout.places else None
        missing: dict[int, list[int]] = {}
        for row in needed:
            if replica_of[row] != own:
                missing.setdefault(replica_of[row], []).append(row)
        for replica, rows in missing.items():
            by_node = replicas[replica]
            candidates = by_node.get(target // plan.cluster.gpus_per_node) or [r for rs in by_node.values() for r in rs]
            source = min(candidates, key=lambda r: (sent[r], r))
            sent[source] += len(rows)
            messages.append((source, target, tuple(rows)))
    return tuple(messages)


def _replicas(layout: Layout, per_node: int) -> list[dict[int, list[int]]]:
    """For each dp replica its ranks by node."""
    replicas: list[dict[int, list[int]]] = [{} for _ in range(layout.dp)]
    for rank, place in layout.places.items():
        replicas[place.dp].setdefault(rank // per_node, []).append(rank)
    return replicas
