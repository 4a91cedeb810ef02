"""Time of reallocation between every source and every target layout of a model, and of batch transfers.

The bytes are those of `plans.reallocation` in closed form, without listing transfers: a target rank receives what it
needs and does not hold; a node receives over the network, once, what some rank of it needs and none of it holds. Both
are exact for every legal layout (tp groups inside a node). What moves depends on the *relation* of two layouts alone:
what their nodes hold (`cost_models.holdings`) and how far apart their meshes begin. It is computed once per relation,
and a node's share of it once per pair of node contents that meet on a node; the target's nodes that the source does
not have receive all they need.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from cost_models.candidates import Array
from cost_models.engines.machine import Machine
from cost_models.holdings import Contents, IntArray, Parts, UnitSizes, unit_sizes
from cost_models.relations import Meeting, Relations
from plans.layout import Layout
from plans.model import ModelSpec


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

    What comes over the network is passed on inside the node in a second round. The two add up here, which they do at
    most: the runtime passes on units while the next ones come. A message's overhead comes for every piece. Nothing
    moves where every rank already holds its slices.
    """
    element_bytes, cluster = machine.element_bytes, machine.cluster
    link_s = element_bytes / machine.link_send_bytes_per_s
    network_s = element_bytes / (machine.network_bytes_per_s * cluster.gpus_per_node)
    relations = Relations.of(sources, targets, cluster.gpus_per_node)
    each = np.empty(len(relations))
    for part, moved in traffic_in_parts(targets[0].spec, relations):
        message_s = moved.messages * machine.constants.message_s
        each[part] = moved.rank_peak * link_s + moved.node_peak * network_s + message_s
    return relations.spread(each)


def reallocation_time(machine: Machine, pairs: Sequence[tuple[Layout, Layout]]) -> Array:
    """Seconds of some reallocations (source, target) of one model, [pairs]; see `reallocation_matrix`."""
    sources = {source: None for source, _ in pairs}
    targets = {target: None for _, target in pairs}
    matrix = reallocation_matrix(machine, list(sources), list(targets))
    row, column = ({layout: i for i, layout in enumerate(seen)} for seen in (sources, targets))
    return np.array([matrix[row[source], column[target]] for source, target in pairs])


def traffic_in_parts(spec: ModelSpec, relations: Relations) -> Iterator[tuple[slice, Traffic]]:
    """What moves in each relation, a part of them at a time: arrays of all pairs of contents would not fit a laptop's
    memory, and arrays that do not fit the processor's cache are slow."""
    sizes = unit_sizes(spec)
    for forms in relations.parts():
        part = relations.of_forms(forms)
        source = relations.source.contents_of(np.arange(forms.start, forms.stop))
        yield part, _traffic(sizes, *source, forms.start, relations, part)


def _traffic(
    sizes: UnitSizes, source: Contents, content: IntArray, first_form: int, relations: Relations, part: slice
) -> Traffic:
    """What moves in a part of the relations; content: [its source forms, nodes], the first of which is `first_form`."""
    target = relations.target
    row, column, offset = (array[part] for array in (relations.row, relations.column, relations.offset))
    meeting = Meeting.of(content, target.content, row - first_form, column, offset, len(target.contents))
    node = _node_traffic(sizes, source, target.contents, meeting.cells)
    network = meeting.over_nodes(node.network, np.add)
    node_peak = np.maximum(meeting.over_nodes(node.network, np.maximum), network / relations.source.form_nodes[row])
    return Traffic(
        received=meeting.over_nodes(node.received, np.add),
        network=network,
        rank_peak=meeting.over_nodes(node.rank_peak, np.maximum),
        node_peak=node_peak,
        messages=meeting.over_nodes(node.messages, np.maximum),
    )


@dataclass(frozen=True, eq=False)
class _NodeTraffic:
    """Traffic of nodes that turn a source content into a target content, [cells]; the words are those of `Traffic`."""

    received: Array
    network: Array
    rank_peak: Array
    messages: Array


def _node_traffic(sizes: UnitSizes, source: Contents, target: Contents, cells: IntArray) -> _NodeTraffic:
    """Traffic of the nodes of some cells (source content x target contents + target content). All sums are whole
    numbers below 2^53, so that they are exact in any order."""
    held, needed = np.divmod(cells, len(target))
    order, groups = _by_degrees(source, target, held, needed)
    held, needed = held[order], needed[order]
    received, peak, messages = (np.zeros(len(cells)) for _ in range(3))
    common = _Common.of(sizes, source, target)
    for own, part, alike, at in groups:
        ours, theirs = held[at], needed[at]
        for gpu, gpus in _gpus(source.stage.shape[1], own, part, alike=alike):
            holds, needs = (source.stage[ours, gpu], source.share[ours, gpu]), target.stage[theirs, gpu]
            overlap = _overlap(gpu, own, part)
            moved, pieces = common.missing(own, part, overlap, *holds, needs, target.share[theirs, gpu])
            received[at] += gpus * moved
            peak[at] = np.maximum(peak[at], moved)
            messages[at] = np.maximum(messages[at], pieces)
    pair = held * len(target) + needed
    network, away = (figure.reshape(-1)[pair] for figure in _from_other_nodes(sizes, source, target))
    owners, takers = (np.maximum((contents.stage > 0).sum(axis=1), 1) for contents in (source, target))
    sends = (received - away) / owners[held] + (away - network) / takers[needed]
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return _NodeTraffic(received[back], network[back], np.maximum(peak, sends)[back], messages[back])


def _by_degrees(
    source: Contents, target: Contents, held: IntArray, needed: IntArray
) -> tuple[IntArray, list[tuple[int, int, bool, slice]]]:
    """An order of cells in which those of equal tp degrees that are even on both sides, or are not, stand together; and
    these groups: the two degrees, whether even, and where they stand."""
    ours, theirs = (sorted(set(contents.tp.tolist())) for contents in (source, target))
    kinds = [*product(ours, theirs, (False, True))]
    row, column = np.searchsorted(ours, source.tp) * len(theirs), np.searchsorted(theirs, target.tp)
    kind = 2 * (row[held] + column[needed]) + (source.even[held] & target.even[needed])
    kind = kind.astype(np.uint16)  # numbers this short are sorted by their digits
    ends = np.cumsum(np.bincount(kind, minlength=len(kinds))).tolist()
    groups = [
        (*named, slice(start, end)) for named, start, end in zip(kinds, [0, *ends], ends, strict=False) if end > start
    ]
    return np.argsort(kind, kind="stable"), groups


def _gpus(per_node: int, own: int, part: int, *, alike: bool) -> list[tuple[int, int]]:
    """GPUs of a node, and for how many each stands: where all hold and need the same stage and share, only the common
    part of their tp parts tells them apart."""
    if not alike:
        return [(gpu, 1) for gpu in range(per_node)]
    count = Counter(_overlap(gpu, own, part) for gpu in range(per_node))
    first = {_overlap(gpu, own, part): gpu for gpu in reversed(range(per_node))}
    return [(first[overlap], gpus) for overlap, gpus in count.items()]


def _from_other_nodes(sizes: UnitSizes, source: Contents, target: Contents) -> tuple[Array, Array]:
    """Of the units that a node needs and does not hold: elements that reach it over the network, and elements that its
    ranks receive; shapes [source contents, target contents].

    Every tp part of a unit takes the unit's replicated parameters along; a unit without sharded ones travels once.
    """
    tp = target.tp[:, None]
    parts = np.where(sizes.sharded > 0, tp, 1)
    once = target.node_units * (sizes.sharded + sizes.replicated * parts)
    each = target.stage_units[target.stage].sum(axis=1) * (sizes.sharded / tp + sizes.replicated)
    network, away = (needed.sum(axis=1) - source.node_units @ needed.T for needed in (once, each))
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
        each = (sizes.sharded + sizes.replicated > 0).astype(np.float64)
        has_experts = (sizes.expert > 0).astype(np.float64)
        weights = np.stack([sizes.sharded, sizes.replicated, each, sizes.expert, has_experts])
        sharded, replicated, units, expert, blocks = (
            (source.stage_units * weight) @ target.stage_units.T if weight.any() else np.zeros((1, 1))
            for weight in weights
        )
        need, shares = weights @ target.stage_units.T, source.share_experts @ target.share_experts.T
        wanted = target.share_experts.sum(axis=1)
        return cls(sharded, replicated, units, expert, blocks, need, shares, wanted)

    def missing(
        self, own: int, part: int, overlap: int, held: IntArray, has: IntArray, needed: IntArray, wants: IntArray
    ) -> tuple[Array, Array]:
        """Elements and pieces that GPUs must receive, [GPUs]: each holds its `own`-th of the stage `held`, with the
        share `has`, and needs its `part`-th of the stage `needed`, with the share `wants`. The tp parts have `overlap`
        / (own x part) of each parameter in common; experts are not cut."""
        pair = held * self.need.shape[1] + needed
        elements, pieces = (figure.reshape(-1)[pair] for figure in self._without_experts(own, part, overlap))
        if self.need[4].any():
            _, _, _, expert, blocks = self.need
            wanted, shared = self.wanted[wants], self.shares[has, wants]
            elements += expert[needed] * wanted - self.expert[held, needed] * shared
            pieces += blocks[needed] * wanted - self.blocks[held, needed] * shared
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


def transfer_time(machine: Machine, messages: Sequence[tuple[int, int]], message_bytes: Sequence[float]) -> float:
    """Seconds to send a batch's tensors: `messages` are (source rank, target rank), `message_bytes` their sizes.

    The busiest rank counts: what it sends or receives over its link or its share of the network, and its messages.
    """
    if not messages:
        return 0.0
    gpus, (sources, targets) = machine.cluster.gpus_per_node, np.array(messages).T
    across = sources // gpus != targets // gpus
    bandwidth = np.where(across, machine.network_bytes_per_s, machine.link_send_bytes_per_s)
    seconds = machine.constants.message_s + np.array(message_bytes) / bandwidth
    return max(float(np.bincount(ranks, weights=seconds).max()) for ranks in (sources, targets))
