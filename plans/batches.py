"""Which samples a data-parallel rank handles, in which order: the arithmetic behind every transfer of a batch.

Minibatch m of a training call is the m-th block of the iteration's samples in every plan, so that the optimizer sees
the same minibatches whatever the layout; inside a block the dp ranks take contiguous runs.
"""

from __future__ import annotations

from plans.graph import CallKind
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
    have, need = rank_rows(plan, producer), rank_rows(plan, consumer)
    owners: dict[int, list[int]] = {}
    for rank, rows in have.items():
        for row in rows:
            owners.setdefault(row, []).append(rank)
    per_node = plan.cluster.gpus_per_node
    sent = dict.fromkeys(have, 0)
    messages: list[tuple[int, int, tuple[int, ...]]] = []
    for target in sorted(need):
        own = set(have.get(target, ()))
        batch: dict[tuple[int, ...], list[int]] = {}
        for row in need[target]:
            if row not in own:
                batch.setdefault(tuple(owners[row]), []).append(row)
        for candidates, missing in batch.items():
            near = [r for r in candidates if r // per_node == target // per_node] or candidates
            source = min(near, key=lambda r: (sent[r], r))
            sent[source] += len(missing)
            messages.append((source, target, tuple(missing)))
    return tuple(messages)
