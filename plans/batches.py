"""Which samples a data-parallel rank handles, in which order: the arithmetic behind every transfer of a batch.

Minibatch m of a training call is the m-th block of the iteration's samples in every plan, so that the optimizer sees
the same minibatches whatever the layout; inside a block the dp ranks take contiguous runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from plans.graph import CallKind
from plans.layout import Layout
from plans.plan import ExecutionPlan
from plans.workload import Workload


@dataclass(frozen=True, slots=True, order=True)
class Message:
    """Samples `rows` of the tensors `keys`, from one rank to another."""

    source: int
    target: int
    rows: tuple[int, ...]
    keys: tuple[str, ...]


def dp_rows(workload: Workload, call: str, dp: int) -> tuple[tuple[int, ...], ...]:
    """Sample numbers of each dp rank of a call, in processing order."""
    kind = workload.graph.call(call).kind
    blocks = workload.minibatches if kind is CallKind.TRAIN_STEP else 1
    block = workload.samples // blocks
    share = block // dp
    return tuple(tuple(m * block + d * share + i for m in range(blocks) for i in range(share)) for d in range(dp))


def rank_rows(plan: ExecutionPlan, call: str) -> dict[int, tuple[int, ...]]:
    """Sample numbers that each rank of a call's mesh needs; a function runs on the mesh of its host call."""
    host = plan.workload.graph.host(call)
    layout = plan.layout(host)
    rows = dp_rows(plan.workload, host, layout.dp)
    return {rank: rows[layout.places[rank].dp] for rank in layout.ranks}


def batch_transfers(plan: ExecutionPlan, producer: str) -> dict[str, tuple[Message, ...]]:
    """Consumer -> messages that bring it a producer's rows, without what a target rank made itself or has been sent for
    a consumer before. Consumers on the producer's ranks need none and are left out."""
    graph, host = plan.workload.graph, plan.workload.graph.host(producer)
    held: dict[tuple[int, str], set[int]] = {}
    found: dict[str, tuple[Message, ...]] = {}
    for edge in graph.edges:
        consumer = edge.target
        if edge.source != producer or edge.distance or consumer in found or plan.workload.graph.host(consumer) == host:
            continue
        keys = tuple(key for key in graph.call(consumer).inputs if key in graph.call(producer).outputs)
        found[consumer] = _messages(plan, host, rank_rows(plan, consumer), keys, held)
        for message in found[consumer]:
            for key in message.keys:
                held.setdefault((message.target, key), set()).update(message.rows)
    return found


def _messages(
    plan: ExecutionPlan,
    host: str,
    needed: Mapping[int, tuple[int, ...]],
    keys: tuple[str, ...],
    held: Mapping[tuple[int, str], Collection[int]],
) -> tuple[Message, ...]:
    """Messages for the rows that ranks need and do not hold. Every rank of a producing replica holds its rows; senders
    on the target's node come first, then the one that has sent least."""
    layout, per_node = plan.layout(host), plan.cluster.gpus_per_node
    replica_of = {row: d for d, rows in enumerate(dp_rows(plan.workload, host, layout.dp)) for row in rows}
    replicas = _replicas(layout, per_node)
    sent = dict.fromkeys(layout.ranks, 0)
    messages: list[Message] = []
    for target, rows in sorted(needed.items()):
        own = layout.places[target].dp if target in layout.places else None
        there = {key: held[target, key] for key in keys if (target, key) in held}
        missing: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for row in rows:
            lacking = keys if not there else tuple(key for key in keys if row not in there.get(key, ()))
            if lacking and replica_of[row] != own:
                missing.setdefault((replica_of[row], lacking), []).append(row)
        for (replica, lacking), part in missing.items():
            by_node = replicas[replica]
            candidates = by_node.get(target // per_node) or [r for rs in by_node.values() for r in rs]
            source = min(candidates, key=lambda r: (sent[r], r))
            sent[source] += len(part)
            messages.append(Message(source, target, tuple(part), lacking))
    return tuple(messages)


def _replicas(layout: Layout, per_node: int) -> list[dict[int, list[int]]]:
    """For each dp replica its ranks by node."""
    replicas: list[dict[int, list[int]]] = [{} for _ in range(layout.dp)]
    for rank, place in layout.places.items():
        replicas[place.dp].setdefault(rank // per_node, []).append(rank)
    return replicas
