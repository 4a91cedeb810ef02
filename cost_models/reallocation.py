"""Time of reallocation between every source and every target layout of a model, and of batch transfers.

The bytes are those of `plans.reallocation` in closed form, without listing transfers: a target rank receives what it
needs and does not hold; a node receives over the network, once, what some rank of it needs and none of it holds. Both
are exact for every legal layout (tp groups inside a node). A node's traffic depends only on what the node holds in
the source and needs in the target, so that it is computed once per pair of node contents (`cost_models.holdings`) and
summed over the nodes that the two meshes share; the target's other nodes receive all they need.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from cost_models.candidates import Array, Flags
from cost_models.engines.machine import Machine
from cost_models.holdings import Contents, Holdings, IntArray, Parts, UnitSizes, unit_sizes
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
    sizes, theirs = unit_sizes(targets[0].spec), target.contents
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
            for gpus, at, overlap in _alike(source, target, block, own, part):
                moved, pieces = common.missing(own, part, overlap, *at)
                received[block] += gpus * moved
                np.maximum(peak[block], moved, out=peak[block])
                np.maximum(messages[block], pieces, out=messages[block])
    network, away = _from_other_nodes(sizes, source, target)
    owners, takers = (np.maximum((contents.stage > 0).sum(axis=1), 1) for contents in (source, target))
    sends = (received - away) / owners[:, None] + (away - network) / takers
    return _NodeTraffic(received, network, np.maximum(peak, sends), messages)


def _alike(
    source: Contents, target: Contents, block: tuple[slice, slice], own: int, part: int
) -> Iterator[tuple[int, tuple[IntArray, ...], int]]:
    """GPUs of a node to which the same happens in some pairs of contents: how many they are; the stages and shares
    that they hold, and those that they need; and what their tp parts have in common."""
    rows, columns = block
    held = zip(source.stage[rows].T, source.share[rows].T, strict=True)
    needed = zip(target.stage[columns].T, target.share[columns].T, strict=True)
    found: dict[tuple[bytes, int], list[tuple[IntArray, ...]]] = defaultdict(list)
    for gpu, ((*ours,), (*theirs,)) in enumerate(zip(held, needed, strict=True)):
        at, overlap = (*ours, *theirs), _overlap(gpu, own, part)
        found[b"".join(array.tobytes() for array in at), overlap].append(at)
    for (_, overlap), same in found.items():
        yield len(same), same[0], overlap


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
    if sizes.expert.any():
        network += _experts_missing(sizes, source, target, target.node_parts)
        away += _experts_missing(sizes, source, target, target.gpu_parts)
    return network, away


def _experts_missing(sizes: UnitSizes, source: Contents, target: Contents, needed: Parts) -> Array:
    """Elements of the experts in some parts of the target's contents that a node of the source's does not hold,
    [source contents, target contents]."""
    held = source.node_parts
    blocks = (source.stage_units * sizes.expert) @ target.stage_units.T
    common = blocks[np.ix_(held.stage, needed.stage)] * (held.experts @ needed.experts.T)
    whole = (target.stage_units @ sizes.expert)[needed.stage] * needed.experts.sum(axis=1)
    missing: Array = needed.of @ whole - (needed.of @ (held.of @ common).T).T
    return missing


@dataclass(frozen=True, eq=False)
class _Common:
    """What the stages of a source and of a target have in common, [source stages, target stages]: elements that tp
    cuts, elements held whole, units, elements of one expert of every common block, and blocks with experts. need: the
    same five of a target stage alone, [5, target stages]. shares: experts that two shares have in common, [source
    shares, target shares]; wanted: experts of a target share alone. known: parts of the answers of `missing`, which
    few different overlaps ask for."""

    sharded: Array
    replicated: Array
    units: Array
    expert: Array
    blocks: Array
    need: Array
    shares: Array
    wanted: Array
    known: dict[tuple[int, int, int], tuple[Array, Array]] = field(default_factory=dict)

    @classmethod
    def of(cls, sizes: UnitSizes, source: Contents, target: Contents) -> _Common:
        each, has_experts = np.ones(len(sizes.expert)), (sizes.expert > 0).astype(np.float64)
        weights = np.stack([sizes.sharded, sizes.replicated, each, sizes.expert, has_experts])
        sharded, replicated, units, expert, blocks = (
            (source.stage_units * weight) @ target.stage_units.T for weight in weights
        )
        need, shares = weights @ target.stage_units.T, source.share_experts @ target.share_experts.T
        wanted = target.share_experts.sum(axis=1)
        return cls(sharded, replicated, units, expert, blocks, need, shares, wanted)

    def missing(
        self, own: int, part: int, overlap: int, held: IntArray, has: IntArray, needed: IntArray, wants: IntArray
    ) -> tuple[Array, Array]:
        """Elements and pieces that GPUs must receive which hold their `own`-th of the stages `held`, with the shares
        `has`, and need their `part`-th of the stages `needed`, with the shares `wants`: [held, needed] each. The tp
        parts have `overlap` / (own x part) of each parameter in common; experts are not cut."""
        at = np.ix_(held, needed)
        elements, pieces = (figure[at] for figure in self._without_experts(own, part, overlap))
        if self.need[4].any():
            _, _, _, expert, blocks = self.need
            wanted, shared = self.wanted[wants], self.shares[np.ix_(has, wants)]
            elements += expert[needed] * wanted - self.expert[at] * shared
            pieces += blocks[needed] * wanted - self.blocks[at] * shared
        return elements, pieces

    def _without_experts(self, own: int, part: int, overlap: int) -> tuple[Array, Array]:
        key = own, part, overlap
        if key not in self.known:
            sharded, replicated, units, *_ = self.need
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
