"""The search space: every layout of every call that can be in an optimum, priced, with the reason of each pruning.

Layouts are enumerated per mesh *shape* (GPUs per node x nodes), because a call's own time and memory do not depend
on where the mesh lies; positions come last. What is left out, and why, is counted in `Space.pruned`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from plans.algorithms import pair_size
from plans.checks import divisors
from plans.cluster import ClusterSpec, DeviceMesh
from plans.graph import CallKind
from plans.strategy import ParallelStrategy, Recompute
from plans.workload import Workload

Placement = tuple[DeviceMesh, ParallelStrategy]
MICRO_BATCH_SAMPLES = (1, 2, 4, 8, 16, 32, 64)
INTERLEAVINGS = (1, 2, 4)
CONTEXT_DEGREES = (1, 2, 4, 8)
CONTEXT_TOKENS = 1024
"""Tokens of the longest sample that context parallelism leaves a rank at least."""
SLOT_PARTS = (1, 2, 4, 8, 16, 32)
"""Slots of a dp rank that are tried: its samples, and these parts of them."""
EVERY_LENGTH_UP_TO = 16
END_TILES = 8
"""On clusters of many nodes: places for a short mesh from either end, and as many evenly spread."""


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """GPUs on each node x nodes."""

    gpus: int
    nodes: int

    @property
    def size(self) -> int:
        """GPUs in all."""
        return self.gpus * self.nodes

    def at(self, node: int, gpu: int = 0) -> DeviceMesh:
        """The mesh of this shape at a place."""
        return DeviceMesh(first_node=node, nodes=self.nodes, first_gpu=gpu, gpus=self.gpus)


Layouts = list[tuple[Shape, ParallelStrategy]]


def shapes(cluster: ClusterSpec) -> list[Shape]:
    """Mesh shapes to try: power-of-two parts of a node, then runs of whole nodes (every length up to
    `EVERY_LENGTH_UP_TO` nodes; on larger clusters lengths with few digits in base two, and their complements)."""
    parts = []
    size = 1
    while size < cluster.gpus_per_node:
        parts.append(Shape(size, 1))
        size *= 2
    return [*parts, *(Shape(cluster.gpus_per_node, nodes) for nodes in _lengths(cluster.nodes))]


def _lengths(nodes: int) -> list[int]:
    if nodes <= EVERY_LENGTH_UP_TO:
        return list(range(1, nodes + 1))
    round_numbers = {digits << shift for digits in (1, 3) for shift in range(nodes.bit_length())}
    round_numbers = {n for n in round_numbers if n <= nodes}
    return sorted(round_numbers | {nodes - n for n in round_numbers if n < nodes} | {nodes})


def positions(shape: Shape, cluster: ClusterSpec) -> list[DeviceMesh]:
    """Where a shape is tried. Whole nodes: every start up to `EVERY_LENGTH_UP_TO` nodes, on larger clusters tiles from
    the left and from the right; of a mesh that is short all the same, `END_TILES` from either end and as many in
    between: a plan has few meshes, and a short one lies beside others at an end of the cluster or of a long mesh. Parts
    of a node: on the first and on the last node, because nodes are alike."""
    if shape.gpus < cluster.gpus_per_node:
        nodes = sorted({0, cluster.nodes - 1})
        return [
            shape.at(node, gpu)
            for node in nodes
            for gpu in range(0, cluster.gpus_per_node - shape.gpus + 1, shape.gpus)
        ]
    last = cluster.nodes - shape.nodes
    if cluster.nodes <= EVERY_LENGTH_UP_TO:
        return [shape.at(node) for node in range(last + 1)]
    left, right = range(0, last + 1, shape.nodes), range(last, -1, -shape.nodes)
    between = range(0, last + 1, cluster.nodes // END_TILES) if len(left) > 3 * END_TILES else ()
    ends = END_TILES if between else len(left)
    return [shape.at(node) for node in sorted({*left[:ends], *right[:ends], *between})]


@dataclass
class Pruned:
    """Counts of what was left out, by reason."""

    counts: Counter[str] = field(default_factory=Counter)

    def note(self, reason: str, count: int = 1) -> None:
        """Add to a reason."""
        if count:
            self.counts[reason] += count


def strategies(
    workload: Workload, call: str, shape: Shape, pruned: Pruned, *, context_parallel: bool
) -> Iterator[ParallelStrategy]:
    """Every legal strategy of a call on a mesh shape; cp above 1 only where the engine has `context_parallel`."""
    spec, kind = workload.spec(call), workload.graph.call(call).kind
    samples = workload.samples_per_step(call)
    for tp in divisors(shape.gpus):
        if any(extent % tp for extent in (spec.kv_heads, *spec.cut_widths, spec.padded_vocab)):
            pruned.note("tp must divide KV heads, ffn and vocabulary")
            continue
        for pp, cp in product(divisors(shape.size // tp), CONTEXT_DEGREES):
            if pp > spec.layers:
                pruned.note("a stage needs a layer")
                continue
            if (shape.size // tp) % (pp * cp):
                pruned.note("pp x cp must divide the GPUs left by tp")
                continue
            if cp > 1 and kind is CallKind.GENERATE:
                continue
            if cp > 1 and not context_parallel:
                pruned.note("this engine has no context parallelism")
                continue
            if cp > 1 and workload.tokens < cp * CONTEXT_TOKENS:
                pruned.note("cp is for long samples")
                continue
            dp = shape.size // (tp * pp * cp)
            if samples % dp:
                pruned.note("dp must divide the samples of a pass")
                continue
            for ep in divisors(spec.experts) if spec.experts else (1,):
                if (dp * cp * tp) % ep:
                    pruned.note("ep must divide dp x cp x tp")
                    continue
                degrees: dict[str, Any] = {"dp": dp, "tp": tp, "pp": pp, "cp": cp, "ep": ep}
                yield from _settings(workload, call, kind, degrees, samples // dp, pruned)


def _settings(
    workload: Workload, call: str, kind: CallKind, degrees: Mapping[str, Any], share: int, pruned: Pruned
) -> Iterator[ParallelStrategy]:
    if kind is CallKind.GENERATE:
        for groups in sorted({1, degrees["pp"]}):
            if share % groups:
                pruned.note("groups in flight must divide the samples of a dp rank")
                continue
            found = {-(-share // (part * groups)) * groups for part in SLOT_PARTS}
            for slots in sorted(found, reverse=True):
                yield ParallelStrategy(**degrees, groups=groups, slots=slots if slots < share else 0)
        return
    pair = pair_size(workload.graph) if kind is CallKind.TRAIN_STEP else 1
    pruned.note("pairs stay in one micro-batch", len([size for size in MICRO_BATCH_SAMPLES if size % pair]))
    cuts = list(_cuts(workload, share, pair))
    if degrees["cp"] > 1:
        pruned.note("where micro-batches can be smaller, dp does what cp would do", len(cuts[1:]))
        cuts = cuts[:1]
    parallel = degrees["tp"] > 1
    pruned.note("with tp, sequence parallelism moves the same bytes and stores less", int(parallel))
    if kind is CallKind.INFERENCE:
        frozen = workload.graph.call(call).model not in workload.graph.trainers
        for cut, offload in product(cuts, (False, True) if frozen else (False,)):
            yield ParallelStrategy(**degrees, sequence_parallel=parallel, offload=offload, **cut)
        return
    yield from _training(workload.spec(call).layers, degrees, cuts, pruned)


def _cuts(workload: Workload, share: int, pair: int) -> Iterator[dict[str, Any]]:
    """Ways to cut a dp rank's samples into micro-batches: by their number where all are of one length, else by the
    tokens of so many of the longest."""
    equal = workload.prompts.full and workload.responses.full
    for size in MICRO_BATCH_SAMPLES:
        if size % pair or size > share:
            continue
        if not equal:
            yield {"micro_batch_tokens": size * workload.tokens}
        elif share % size == 0:
            yield {"micro_batches": share // size}


def _training(
    layers: int, degrees: Mapping[str, Any], cuts: list[dict[str, Any]], pruned: Pruned
) -> Iterator[ParallelStrategy]:
    pp, parallel = degrees["pp"], degrees["tp"] > 1
    sharding = (True, False) if degrees["dp"] * degrees["cp"] > 1 else (True,)
    for cut, vpp in product(cuts, INTERLEAVINGS):
        rounds = cut.get("micro_batches", 0) % pp == 0  # packs are filled up to full rounds
        if vpp > 1 and (pp == 1 or layers % (pp * vpp) or not rounds):
            pruned.note("interleaving needs pp, equal chunks and full rounds of micro-batches")
            continue
        for recompute, offload, shard in product(Recompute, (False, True), sharding):
            settings = {"recompute": recompute, "offload": offload, "shard_optimizer": shard, **cut}
            yield ParallelStrategy(**degrees, vpp=vpp, sequence_parallel=parallel, **settings)
