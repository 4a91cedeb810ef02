"""Time of reallocation between every source and every target layout of a model, and of batch transfers.

The bytes are those of `plans.reallocation` in closed form, without listing transfers: a target rank receives what it
needs and does not hold; a node receives over the network, once, what some rank of it needs and none of it holds. Both
are exact for every legal layout (tp groups inside a node). A node's traffic depends only on what the node holds in
the source and needs in the target, so that it is computed once per pair of node contents (`cost_models.holdings`) and
summed over the nodes that the two meshes share; the target's other nodes receive all they need.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np

from cost_models.candidates import Array, Flags
from cost_models.engines.machine import Machine
from cost_models.holdings import Contents, Holdings, IntArray, UnitSizes, merged, unit_sizes
from plans.cluster import ClusterSpec
from plans.layout import Layout

PAIRS_AT_ONCE = 2**20
"""Pairs of layouts whose traffic is computed together."""
RUN = 256
"""Contents of nodes that are compared with as many others at a time."""


@dataclass(frozen=True, eq=False)
class Traffic:
    """Elements that move, for every source x target pair; shapes [sources, targets].

    received: over all ranks. network: of those, what crosses nodes. rank_peak: most that one rank receives or sends
    inside a node. node_peak: most that one node receives from or sends to the network; the source's nodes send equal
    parts. messages: most pieces that one rank receives.
    """

    received: Array
    network: Array
    rank_peak: Array
    node_peak: Array
    messages: Array


def reallocation_matrix(machine: Machine, sources: Sequence[Layout], targets: Sequence[Layout]) -> Array:
    """Seconds to make a copy of a model's weights in each target layout out of each source layout, [sources, targets].

    What comes over the network is passed on inside the node in a second round, so that the two add up, and a message's
    overhead for every piece. Nothing moves where every rank already holds its slices.
    """
    element_bytes, cluster = machine.element_bytes, machine.cluster
    link_s = element_bytes / machine.link_send_bytes_per_s
    network_s = element_bytes / (machine.network_bytes_per_s * cluster.gpus_per_node)
    seconds = np.empty((len(sources), len(targets)))
    for rows, moved in _traffic_in_parts(cluster, sources, targets):
        each = moved.rank_peak * link_s + moved.node_peak * network_s + moved.messages * machine.constants.message_s
        seconds[rows] = each
    return seconds


def reallocation_time(machine: Machine, pairs: Sequence[tuple[Layout, Layout]]) -> Array:
    """Seconds of some reallocations (source, target) of one model, [pairs]; see `reallocation_matrix`."""
    sources = {source: None for source, _ in pairs}
    targets = {target: None for _, target in pairs}
    matrix = reallocation_matrix(machine, list(sources), list(targets))
    row, column = ({layout: i for i, layout in enumerate(seen)} for seen in (sources, targets))
    return np.array([matrix[row[source], column[target]] for source, target in pairs])


def reallocation_traffic(cluster: ClusterSpec, sources: Sequence[Layout], targets: Sequence[Layout]) -> Traffic:
    """What moves between every source and target layout of one model."""
    whole = Traffic(*(np.empty((len(sources), len(targets))) for _ in fields(Traffic)))
    for rows, moved in _traffic_in_parts(cluster, sources, targets):
        for figure in fields(Traffic):
            getattr(whole, figure.name)[rows] = getattr(moved, figure.name)
    return whole


def _traffic_in_parts(
    cluster: ClusterSpec, sources: Sequence[Layout], targets: Sequence[Layout]
) -> Iterator[tuple[IntArray, Traffic]]:
    """Some of the sources, and what moves between each of them and every target.

    A dozen arrays of all pairs would not fit a laptop's memory on a thousand GPUs (20 million pairs), and arrays that
    do not fit the processor's cache are slow. Sources of one form stand in one part, because their nodes' contents are
    the same."""
    source, target = (Holdings.of(layouts, cluster.gpus_per_node) for layouts in (sources, targets))
    sizes, ours, theirs = merged(unit_sizes(targets[0].spec), source.contents, target.contents)
    source, target = replace(source, contents=ours), replace(target, contents=theirs)
    rows = np.bincount(source.form, minlength=len(source.content))
    different = np.array([len(np.unique(contents)) for contents in source.content])
    pairs = rows * len(targets) + different * len(theirs)  # of layouts and of contents, of every form
    part = (np.cumsum(pairs) // PAIRS_AT_ONCE)[source.form]
    for number in np.unique(part):
        here = np.flatnonzero(part == number)
        yield here, _traffic(sizes, source.take(here), target)


def _traffic(sizes: UnitSizes, source: Holdings, target: Holdings) -> Traffic:
    node = _node_traffic(sizes, source.contents, target.contents)
    shared = _SharedNodes.of(source, target)
    network = shared.over_nodes(node.network, np.add)
    node_peak = np.maximum(shared.over_nodes(node.network, np.maximum), network / source.nodes[:, None])
    return Traffic(
        received=shared.over_nodes(node.received, np.add),
        network=network,
        rank_peak=shared.over_nodes(node.rank_peak, np.maximum),
        node_peak=node_peak,
        messages=shared.over_nodes(node.messages, np.maximum),
    )


@dataclass(frozen=True, eq=False)
class _NodeTraffic:
    """Traffic of one node by its contents, [source contents, target contents]; the words are those of `Traffic`."""

    received: Array
    network: Array
    rank_peak: Array
    messages: Array


def _node_traffic(sizes: UnitSizes, source: Contents, target: Contents) -> _NodeTraffic:
    """Traffic of a node that turns each source content into each target content. All sums are whole numbers below
    2^53, so that they are exact in any order."""
    received, peak, messages = (np.zeros((len(source), len(target))) for _ in range(3))
    common = _Common.of(sizes, source, target)
    for rows, own in _runs(source.tp):
        for columns, part in _runs(target.tp):
            block = rows, columns
            holds, needs = source.stage[rows].T, target.stage[columns].T
            alike = Counter(
                (held.tobytes(), needed.tobytes(), _overlap(gpu, own, part))
                for gpu, (held, needed) in enumerate(zip(holds, needs, strict=True))
            )
            for (held, needed, overlap), gpus in alike.items():
                elements, pieces = common.missing(own, part, overlap)
                at = np.ix_(np.frombuffer(held, dtype=np.int64), np.frombuffer(needed, dtype=np.int64))
                moved = elements[at]
                received[block] += gpus * moved
                np.maximum(peak[block], moved, out=peak[block])
                np.maximum(messages[block], pieces[at], out=messages[block])
    network, away = _from_other_nodes(sizes, source, target)
    owners, takers = (np.maximum((contents.stage > 0).sum(axis=1), 1) for contents in (source, target))
    sends = (received - away) / owners[:, None] + (away - network) / takers
    return _NodeTraffic(received, network, np.maximum(peak, sends), messages)


def _runs(tp: IntArray) -> Iterator[tuple[slice, int]]:
    """Short runs of contents of one tensor degree, and the degree. Short, so that arrays of two runs stay in the
    processor's cache."""
    for degree in np.unique(tp).tolist():
        places = np.flatnonzero(tp == degree)
        first, end = int(places[0]), int(places[-1]) + 1
        assert end - first == len(places), "contents stand in the order of their tensor degree"
        for start in range(first, end, RUN):
            yield slice(start, min(start + RUN, end)), degree


def _from_other_nodes(sizes: UnitSizes, source: Contents, target: Contents) -> tuple[Array, Array]:
    """Of the units that a node needs and does not hold: elements that reach it over the network, and elements that its
    ranks receive; shapes [source contents, target contents].

    Every tp part of a unit takes the unit's replicated parameters along; a unit without sharded ones travels once.
    """
    tp = target.tp[:, None]
    parts = np.where(sizes.sharded > 0, tp, 1)
    once = target.node_units * (sizes.sharded + sizes.replicated * parts)
    each = target.stage_units[target.stage].sum(axis=1) * (sizes.sharded / tp + sizes.replicated)
    held = source.node_units.T
    network, away = (needed.sum(axis=1) - (needed @ held).T for needed in (once, each))
    return network, away


@dataclass(frozen=True, eq=False)
class _Common:
    """What source stages and target stages have in common, [source stages, target stages]: elements that tp cuts,
    elements held whole, and units. need: the same three of a target stage alone, [3, target stages]. known: answers of
    `missing`, which few different overlaps ask for."""

    sharded: Array
    replicated: Array
    units: Array
    need: Array
    known: dict[tuple[int, int, int], tuple[Array, Array]] = field(default_factory=dict)

    @classmethod
    def of(cls, sizes: UnitSizes, source: Contents, target: Contents) -> _Common:
        weights = np.stack([sizes.sharded, sizes.replicated, sizes.count])
        sharded, replicated, units = ((source.stage_units * weight) @ target.stage_units.T for weight in weights)
        return cls(sharded, replicated, units, weights @ target.stage_units.T)

    def missing(self, own: int, part: int, overlap: int) -> tuple[Array, Array]:
        """Elements and pieces that a GPU must receive which holds its `own`-th of a source stage and needs its
        `part`-th of a target stage, [source stages, target stages]; the two have `overlap` / (own x part) of each
        parameter in common."""
        key = own, part, overlap
        if key not in self.known:
            sharded, replicated, units = self.need
            elements = sharded / part + replicated - overlap * self.sharded / (own * part) - self.replicated
            self.known[key] = elements, units - overlap * self.units / own
        return self.known[key]


def _overlap(gpu: int, own: int, part: int) -> int:
    """What the GPU's parts of a parameter that is cut in `own` and in `part` have in common, in 1 / (own x part)."""
    low = max((gpu % own) * part, (gpu % part) * own)
    high = min((gpu % own + 1) * part, (gpu % part + 1) * own)
    return max(high - low, 0)


@dataclass(frozen=True, eq=False)
class _SharedNodes:
    """The nodes that a source and a target mesh share, for all pairs of meshes that share some.

    pairs: [sources, targets], where they do. cell: [shared nodes], source and target content of each of them as an
    index into a flat [source contents, target contents]; those of a pair stand together, the first at `start`.
    column: [pairs that share], the target. before, after: [pairs that share], the first shared node and the one after
    the last, counted in the target's mesh.
    """

    target: Holdings
    pairs: Flags
    cell: IntArray
    start: IntArray
    column: IntArray
    before: IntArray
    after: IntArray

    @classmethod
    def of(cls, source: Holdings, target: Holdings) -> _SharedNodes:
        low = np.maximum(source.first[:, None], target.first)
        high = np.minimum(source.last[:, None], target.last) + 1
        pairs = high > low
        row, column = np.nonzero(pairs)
        low, high = low[pairs], high[pairs]
        count = high - low
        start = np.cumsum(count) - count
        step = np.arange(count.sum()) - np.repeat(start, count)
        holds, needs = (
            h.content.reshape(-1)[np.repeat(h.form[i] * h.content.shape[1] + low - h.first[i], count) + step]
            for h, i in ((source, row), (target, column))
        )
        first = target.first[column]
        return cls(target, pairs, holds * len(target.contents) + needs, start, column, low - first, high - first)

    def over_nodes(self, figure: Array, combine: np.ufunc) -> Array:
        """A figure of nodes [source contents, target contents] summed (or the largest) over the nodes of the target
        mesh, [sources, targets]."""
        apart = figure[0, self.target.content]
        zero = np.zeros((len(apart), 1))
        left = np.concatenate([zero, combine.accumulate(apart, axis=1)], axis=1)
        right = np.concatenate([combine.accumulate(apart[:, ::-1], axis=1)[:, ::-1], zero], axis=1)
        form = self.target.form
        result: Array = np.tile(left[form, -1], (len(self.pairs), 1))
        outside = combine(left[form[self.column], self.before], right[form[self.column], self.after])
        result[self.pairs] = combine(outside, combine.reduceat(figure.reshape(-1)[self.cell], self.start))
        return result


def transfer_time(machine: Machine, messages: Sequence[tuple[int, int]], message_bytes: Sequence[float]) -> float:
    """Seconds to send a batch's tensors: `messages` are (source rank, target rank), `message_bytes` their sizes.

    The busiest rank counts: what it sends or receives over its link or its share of the network, and its messages.
    """
    gpus = machine.cluster.gpus_per_node
    busy: dict[tuple[int, str], float] = defaultdict(float)
    for (source, target), size in zip(messages, message_bytes, strict=True):
        across = source // gpus != target // gpus
        bandwidth = machine.network_bytes_per_s if across else machine.link_send_bytes_per_s
        seconds = machine.constants.message_s + size / bandwidth
        busy[source, "sends"] += seconds
        busy[target, "receives"] += seconds
    return max(busy.values(), default=0.0)
