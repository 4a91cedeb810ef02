"""Time of reallocation between every source and every target layout of a model, and of batch transfers.

The bytes are those of `plans.reallocation` in closed form, without listing transfers: a target rank receives what it
needs and does not hold; a node receives over the network, once, what some rank of it needs and none of it holds.
A unit is held by whole stages and a stage's tp ranks share it by fractions, so that for all source x target pairs the
common elements of a rank are one matrix product over units times the overlap of two fractions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cost_models.candidates import Array
from cost_models.engines import Engine
from cost_models.holdings import Holdings, UnitSizes, unit_sizes
from cost_models.machine import Machine
from plans.cluster import ClusterSpec
from plans.layout import Layout


@dataclass(frozen=True, eq=False)
class Traffic:
    """Elements that move, for every source x target pair; shapes [sources, targets].

    received: over all ranks. network: of those, what crosses nodes. rank_peak: most that one rank receives or sends
    inside a node. node_peak: most that one node receives from or sends to the network. messages: most pieces that one
    rank receives.
    """

    received: Array
    network: Array
    rank_peak: Array
    node_peak: Array
    messages: Array


def reallocation_matrix(
    cluster: ClusterSpec, engine: Engine, element_bytes: float, sources: Sequence[Layout], targets: Sequence[Layout]
) -> Array:
    """Seconds to make a copy of a model's weights in each target layout out of each source layout, [sources, targets].

    Links inside the nodes and the network work at the same time; the slower one counts, and a message's overhead for
    every piece. Nothing moves where every rank already holds its slices.
    """
    machine = Machine(cluster, engine)
    moved = reallocation_traffic(cluster, sources, targets)
    link_s = moved.rank_peak * (element_bytes / machine.link_bytes_per_s)
    network_s = moved.node_peak * (element_bytes / (machine.network_bytes_per_s * cluster.gpus_per_node))
    seconds: Array = np.maximum(link_s, network_s) + moved.messages * engine.message_s
    return seconds


def reallocation_time(
    cluster: ClusterSpec, engine: Engine, element_bytes: float, pairs: Sequence[tuple[Layout, Layout]]
) -> Array:
    """Seconds of some reallocations (source, target) of one model, [pairs]; see `reallocation_matrix`."""
    sources = {source: None for source, _ in pairs}
    targets = {target: None for _, target in pairs}
    matrix = reallocation_matrix(cluster, engine, element_bytes, list(sources), list(targets))
    row, column = ({layout: i for i, layout in enumerate(seen)} for seen in (sources, targets))
    return np.array([matrix[row[source], column[target]] for source, target in pairs])


def reallocation_traffic(cluster: ClusterSpec, sources: Sequence[Layout], targets: Sequence[Layout]) -> Traffic:
    """What moves between every source and target layout of one model."""
    sizes = unit_sizes(targets[0].spec)
    source, target = Holdings.of(sources, cluster), Holdings.of(targets, cluster)
    shape = (len(sources), len(targets))
    total, network, rank_peak, node_peak, messages = (np.zeros(shape) for _ in range(5))
    sent = _network_out(sizes, source, target, cluster.nodes)
    for node in range(cluster.nodes):
        arrived = _node_received(sizes, source, target, node)
        inside = np.zeros(shape)
        for rank in range(node * source.per_node, (node + 1) * source.per_node):
            received, pieces = _rank_received(sizes, source, target, rank)
            inside += received
            np.maximum(rank_peak, received, out=rank_peak)
            np.maximum(messages, pieces, out=messages)
        senders = _senders(source, target, node)
        np.maximum(rank_peak, np.maximum(inside - arrived, 0.0) / senders, out=rank_peak)
        np.maximum(node_peak, np.maximum(arrived, sent[node]), out=node_peak)
        total += inside
        network += arrived
    return Traffic(total, network, rank_peak, node_peak, messages)


def _overlap(start: Array, stop: Array, other_start: Array, other_stop: Array) -> Array:
    """Common length of every pair of intervals, [sources, targets]."""
    low = np.maximum(start[:, None], other_start[None, :])
    high = np.minimum(stop[:, None], other_stop[None, :])
    common: Array = np.maximum(high - low, 0.0)
    return common


def _rank_received(sizes: UnitSizes, source: Holdings, target: Holdings, rank: int) -> tuple[Array, Array]:
    """Elements and pieces that a rank must receive, [sources, targets]."""
    holds, needs = source.units_of_rank(rank), target.units_of_rank(rank)
    common = _overlap(source.start[:, rank], source.stop[:, rank], target.start[:, rank], target.stop[:, rank])
    fraction = target.stop[:, rank] - target.start[:, rank]
    sharded = fraction * (needs @ sizes.sharded) - common * ((holds * sizes.sharded) @ needs.T)
    replicated = needs @ sizes.replicated - (holds * sizes.replicated) @ needs.T
    kept = np.divide(common, fraction, out=np.zeros_like(common), where=np.broadcast_to(fraction, common.shape) > 0)
    pieces = needs.sum(axis=1) - kept * (holds @ needs.T)
    return _clean(sharded + replicated), _clean(pieces)


def _node_received(sizes: UnitSizes, source: Holdings, target: Holdings, node: int) -> Array:
    """Elements that reach a node over the network, [sources, targets].

    Every tp part of a unit takes the unit's replicated parameters along; a unit without sharded ones travels once.
    """
    holds, needs = source.units_of_node(node), target.units_of_node(node)
    start, stop, _ = source.node_fraction(node)
    need_start, need_stop, parts = target.node_fraction(node)
    common = _overlap(start, stop, need_start, need_stop)
    fraction = np.maximum(need_stop - need_start, 0.0)
    sharded = fraction * (needs @ sizes.sharded) - common * ((holds * sizes.sharded) @ needs.T)
    with_parts, once = np.where(sizes.sharded > 0, sizes.replicated, 0.0), np.where(sizes.sharded > 0, 0.0, 1.0)
    replicated = parts * (needs @ with_parts - (holds * with_parts) @ needs.T)
    alone = once * sizes.replicated
    return _clean(sharded + replicated + needs @ alone - (holds * alone) @ needs.T)


def _network_out(sizes: UnitSizes, source: Holdings, target: Holdings, nodes: int) -> Array:
    """Elements that each node sends over the network, [nodes, sources, targets]: a unit that other nodes need is sent
    in equal parts by the nodes that hold it (senders are chosen by least load)."""
    weight = sizes.sharded + sizes.replicated
    holds = np.stack([source.units_of_node(node) for node in range(nodes)])
    needs = np.stack([target.units_of_node(node) for node in range(nodes)])
    share = holds / np.maximum(holds.sum(axis=0), 1.0) * weight
    wanted = needs.sum(axis=0)[None] - np.einsum("nsu,ntu->stu", holds, needs, optimize=True)
    sent: Array = np.einsum("nsu,stu->nst", share, wanted, optimize=True)
    return sent


def _senders(source: Holdings, target: Holdings, node: int) -> Array:
    """Ranks of a node that share the sending inside it: its source ranks, or where it has none its target ranks."""
    ranks = slice(node * source.per_node, (node + 1) * source.per_node)
    owners = source.inside[:, ranks].sum(axis=1)[:, None]
    takers = target.inside[:, ranks].sum(axis=1)[None, :]
    senders: Array = np.maximum(np.where(owners > 0, owners, takers), 1).astype(np.float64)
    return senders


def _clean(elements: Array) -> Array:
    """Differences of equal sums without their rounding noise."""
    return np.where(elements < 0.5, 0.0, elements)


def transfer_time(
    cluster: ClusterSpec, engine: Engine, messages: Sequence[tuple[int, int]], message_bytes: Sequence[float]
) -> float:
    """Seconds to send a batch's tensors: `messages` are (source rank, target rank), `message_bytes` their sizes.

    The busiest rank counts: what it sends or receives over its link or its share of the network, and its messages.
    """
    machine = Machine(cluster, engine)
    busy: dict[tuple[int, str], float] = defaultdict(float)
    for (source, target), size in zip(messages, message_bytes, strict=True):
        across = source // cluster.gpus_per_node != target // cluster.gpus_per_node
        bandwidth = machine.network_bytes_per_s if across else machine.link_bytes_per_s
        seconds = engine.message_s + size / bandwidth
        busy[source, "sends"] += seconds
        busy[target, "receives"] += seconds
    return max(busy.values(), default=0.0)
