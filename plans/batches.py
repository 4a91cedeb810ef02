"""Which samples a data-parallel rank handles, in which micro-batches: the arithmetic behind every transfer of a batch.

Minibatch m of a training call is the m-th block of the iteration's samples in every plan, so that the optimizer sees
the same minibatches whatever the layout; inside a block the samples are dealt to the dp ranks by the work they are.
Everything here is a pure function of the plan and of the lengths of an iteration, so that all ranks come to the same
answer without a message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import pairwise

from plans.algorithms import pair_size
from plans.graph import CallKind
from plans.layout import Layout
from plans.model import ModelSpec
from plans.plan import ExecutionPlan
from plans.strategy import ParallelStrategy
from plans.workload import Workload

Numbers = tuple[int, ...]
"""Numbers of samples of an iteration."""


@dataclass(frozen=True, slots=True, order=True)
class Message:
    """Samples `rows` of the tensors `keys`, from one rank to another."""

    source: int
    target: int
    rows: Numbers
    keys: tuple[str, ...]


def sample_work(spec: ModelSpec, tokens: int) -> int:
    """What a sample costs in the blocks of a forward pass, multiply-adds: every active weight once per token, and
    causal attention's queries x keys and weights x values, tokens^2 / 2 pairs each (Kaplan et al. 2020, 2.1)."""
    idle = spec.expert_layers * (spec.experts - spec.experts_per_token) * spec.expert_params
    pairs = spec.layers * spec.heads * (spec.head_dim + spec.value_width) // 2 * tokens
    return tokens * (spec.blocks_params - idle + pairs)


def assign(
    workload: Workload, call: str, layout: Layout, lengths: Sequence[int] | None = None
) -> tuple[tuple[Numbers, ...], ...]:
    """Samples of each dp rank of a call: dp rank -> pass (a minibatch in training, else the only one) -> numbers.

    lengths: tokens of every sample of the iteration, once they are known. Without them, and where nothing is gained by
    it, each pass deals contiguous runs. A pair of dpo or reward modelling is never parted.
    """
    kind = workload.graph.call(call).kind
    passes = workload.minibatches if kind is CallKind.TRAIN_STEP else 1
    block, unit = workload.samples // passes, unit_of(workload, call)
    balanced = lengths if kind is not CallKind.GENERATE else None
    found = [_deal(range(m * block, (m + 1) * block), unit, layout, balanced) for m in range(passes)]
    return tuple(tuple(part[d] for part in found) for d in range(layout.dp))


def unit_of(workload: Workload, call: str) -> int:
    """Samples that stay together on a rank and in a micro-batch: the two of a pair that is trained on, else one."""
    trains = workload.graph.call(call).kind is CallKind.TRAIN_STEP
    return pair_size(workload.graph) if trains else 1


def _deal(rows: range, unit: int, layout: Layout, lengths: Sequence[int] | None) -> list[Numbers]:
    units = [tuple(rows[at : at + unit]) for at in range(0, len(rows), unit)]
    bounds = [d * len(units) // layout.dp for d in range(layout.dp + 1)]
    runs = [tuple(row for one in units[a:b] for row in one) for a, b in pairwise(bounds)]
    if lengths is None or layout.dp == 1:
        return runs
    work = {row: sample_work(layout.spec, lengths[row]) for row in rows}
    dealt = evenly([sum(work[row] for row in one) for one in units], layout.dp)
    found = [tuple(row for index in part for row in units[index]) for part in dealt]
    most, before = (max(sum(work[row] for row in part) for part in parts) for parts in (found, runs))
    return runs if before <= most else found


def evenly(work: Sequence[int], parts: int) -> list[Numbers]:
    """Indices of `work` in `parts` parts of nearly equal sums: the largest first, each to the part that has least
    (Graham 1969: at most 4/3 of the optimum)."""
    heap = [(0, part) for part in range(parts)]
    heapify(heap)
    found: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        done, part = heap[0]
        found[part].append(index)
        heapreplace(heap, (done + work[index], part))
    return [tuple(sorted(part)) for part in found]


def packs(tokens: Sequence[int], limit: int) -> list[Numbers]:
    """Indices of `tokens` in micro-batches of at most `limit` tokens, by first-fit decreasing (at most 11/9 of the
    fewest, plus one; Johnson 1973). Where as many parts of nearly equal sums keep the limit, they are taken.

    A single one above the limit stands alone: `plans.checks` refuses plans where that could happen.
    """
    filled: list[int] = []
    found: list[list[int]] = []
    for index in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        size = tokens[index]
        place = next((place for place, held in enumerate(filled) if held + size <= limit), len(filled))
        if place == len(filled):
            filled.append(0)
            found.append([])
        filled[place] += size
        found[place].append(index)
    even = evenly(tokens, len(found))
    if all(sum(tokens[i] for i in part) <= limit for part in even):
        return even
    return [tuple(sorted(part)) for part in found]


def micro_batches(
    strategy: ParallelStrategy, shares: Sequence[Numbers], lengths: Sequence[int], unit: int = 1
) -> list[list[Numbers]]:
    """Micro-batches of one pass: dp rank -> micro-batch -> samples.

    shares: the samples of each dp rank (`assign`). Where all ranks of a stage must run in step (model chunks that take
    turns, experts spread over dp), every rank has as many as the one that needs most; what is missing is empty.
    """
    found = [_of_share(strategy, share, lengths, unit) for share in shares]
    if strategy.vpp > 1 or strategy.ep > 1:
        count = max(map(len, found))
        if strategy.vpp > 1:
            count = -(-count // strategy.pp) * strategy.pp
        found = [[*parts, *[()] * (count - len(parts))] for parts in found]
    return found


def _of_share(strategy: ParallelStrategy, share: Numbers, lengths: Sequence[int], unit: int) -> list[Numbers]:
    units = [share[at : at + unit] for at in range(0, len(share), unit)]
    tokens = [sum(lengths[row] for row in one) for one in units]
    limit = strategy.micro_batch_tokens
    parts = packs(tokens, limit) if limit else evenly(tokens, strategy.micro_batches)
    return [tuple(row for index in part for row in units[index]) for part in parts] or [()]


@dataclass(frozen=True, slots=True)
class Share:
    """What one dp rank does of a call in an iteration.

    passes: its samples of each minibatch in training, else of the one pass. micro_batches: for each pass, places in it.
    imbalance: work of the busiest dp rank over the mean, at least 1; in training of the sum of the busiest of each
    minibatch.
    """

    passes: tuple[Numbers, ...]
    micro_batches: tuple[tuple[Numbers, ...], ...]
    imbalance: float

    @property
    def samples(self) -> Numbers:
        """All samples, in processing order."""
        return sum(self.passes, ())


def share_of(plan: ExecutionPlan, call: str, rank: int, lengths: Sequence[int]) -> Share:
    """The share of a rank of a call's mesh; lengths: tokens of every sample of the iteration."""
    workload, host = plan.workload, plan.workload.graph.host(call)
    layout, strategy = plan.layout(host), plan.planned(host).strategy
    shares = assign(workload, host, layout, lengths)
    own = layout.places[rank].dp
    cuts, busiest, total = [], 0, 0
    for part in zip(*shares, strict=True):
        work = [sum(sample_work(layout.spec, lengths[row]) for row in rows) for rows in part]
        busiest, total = busiest + max(work), total + sum(work)
        found = micro_batches(strategy, part, lengths, unit_of(workload, host))[own]
        place = {row: i for i, row in enumerate(part[own])}
        cuts.append(tuple(tuple(place[row] for row in rows) for rows in found))
    return Share(shares[own], tuple(cuts), busiest * layout.dp / max(total, 1))


def rank_samples(plan: ExecutionPlan, call: str, lengths: Sequence[int] | None = None) -> dict[int, Numbers]:
    """Samples that each rank of a call's mesh handles, in processing order; a function runs on the mesh of its host."""
    host = plan.workload.graph.host(call)
    layout = plan.layout(host)
    samples = [sum(share, ()) for share in assign(plan.workload, host, layout, lengths)]
    return {rank: samples[replica] for rank, replica in layout.replica_of.items()}


def lengths_from(plan: ExecutionPlan, call: str) -> str:
    """The generate call whose responses a call reads, so that its lengths deal the call's samples; empty where the data
    set gives the responses."""
    graph = plan.workload.graph
    if graph.call(call).kind is CallKind.GENERATE:
        return call
    made = [graph.producers[key] for key in graph.call(call).inputs if key in graph.producers]
    found = [name for name in made if graph.call(name).kind is CallKind.GENERATE]
    return found[0] if found else next((lengths_from(plan, name) for name in made), "")


def lengths_routes(plan: ExecutionPlan, generate: str) -> dict[int, int]:
    """Target -> source of the lengths that a generate call made: every other rank that deals samples by them, from a
    rank of the generation on its own node where there is one, in turn."""
    makers, per_node = plan.layout(generate).ranks, plan.cluster.gpus_per_node
    users = [call.name for call in plan.workload.graph.calls if lengths_from(plan, call.name) == generate]
    users += [target for call in users for target, _ in consumers(plan, call) if can_move(plan, call, target)]
    targets = sorted({rank for call in users for rank in plan.ranks(plan.workload.graph.host(call))} - set(makers))
    near: dict[int, list[int]] = {}
    for rank in makers:
        near.setdefault(rank // per_node, []).append(rank)
    found: dict[int, int] = {}
    for turn, target in enumerate(targets):
        sources = near.get(target // per_node, makers)
        found[target] = sources[turn % len(sources)]
    return found


def can_move(plan: ExecutionPlan, producer: str, consumer: str) -> bool:
    """Whether some iteration may need messages between two calls: not when every rank of the consumer took part in the
    only replica of the producer."""
    made = plan.layout(plan.workload.graph.host(producer))
    return made.dp > 1 or not set(plan.ranks(plan.workload.graph.host(consumer))) <= set(made.ranks)


def consumers(plan: ExecutionPlan, producer: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Calls on other hosts that read in the same iteration what a call makes, each with the tensors it reads."""
    graph, host = plan.workload.graph, plan.workload.graph.host(producer)
    for target in dict.fromkeys(e.target for e in graph.edges if e.source == producer and not e.distance):
        if graph.host(target) != host:
            yield target, tuple(key for key in graph.call(target).inputs if key in graph.call(producer).outputs)


def batch_transfers(
    plan: ExecutionPlan, producer: str, lengths: Sequence[int] | None = None
) -> dict[str, tuple[Message, ...]]:
    """Consumer -> messages that bring it a producer's rows, without what a target rank made itself or has been sent for
    a consumer before.

    lengths: those of the iteration's samples by the generate call that the producer belongs to. A consumer that belongs
    to another one (the greedy responses of ReMax) gets every row, because its share is not known to the producer.
    """
    graph = plan.workload.graph
    source, host = lengths_from(plan, producer), graph.host(producer)
    found: dict[str, tuple[Message, ...]] = {}
    readers = list(consumers(plan, producer))
    if not readers:
        return found
    layout = plan.layout(host)
    made = _Made.of(layout, assign(plan.workload, host, layout, lengths), plan.cluster.gpus_per_node)
    held: dict[tuple[int, str], set[int]] = {}
    for consumer, keys in readers:
        needed = rank_samples(plan, consumer, lengths)
        if lengths_from(plan, consumer) != source:
            needed = dict.fromkeys(needed, tuple(range(plan.workload.samples)))
        found[consumer] = _messages(made, needed, keys, held)
        for message in found[consumer] if consumer != readers[-1][0] else ():
            for key in message.keys:
                held.setdefault((message.target, key), set()).update(message.rows)
    return found


@dataclass(frozen=True)
class _Made:
    """Who holds what a call makes: every rank of a dp replica its rows. replica_of: row -> replica. own: rank -> its
    replica. nodes: replica -> node -> the ranks there."""

    replica_of: Mapping[int, int]
    own: Mapping[int, int]
    nodes: Sequence[Mapping[int, Sequence[int]]]
    per_node: int

    @classmethod
    def of(cls, layout: Layout, shares: Sequence[tuple[Numbers, ...]], per_node: int) -> _Made:
        replica_of = {row: d for d, passes in enumerate(shares) for rows in passes for row in rows}
        nodes: list[dict[int, list[int]]] = [{} for _ in range(layout.dp)]
        for rank, replica in layout.replica_of.items():
            nodes[replica].setdefault(rank // per_node, []).append(rank)
        return cls(replica_of, layout.replica_of, nodes, per_node)

    def senders(self, replica: int, node: int) -> Sequence[int]:
        """The ranks of a replica on a node, all of them where there are none."""
        return self.nodes[replica].get(node) or [rank for ranks in self.nodes[replica].values() for rank in ranks]


def _messages(
    made: _Made, needed: Mapping[int, Numbers], keys: tuple[str, ...], held: Mapping[tuple[int, str], set[int]]
) -> tuple[Message, ...]:
    """Messages for the rows that ranks need and do not hold; senders on the target's node come first, then the one that
    has sent least."""
    sent = dict.fromkeys(made.own, 0)
    messages: list[Message] = []
    heaps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    split: dict[Numbers, dict[int, Numbers]] = {}  # ranks of one replica need the same rows
    for target in sorted(needed):
        rows, own = needed[target], made.own.get(target)
        if rows not in split:
            split[rows] = _by_replica(rows, made.replica_of)
        there = {key: held[target, key] for key in keys if (target, key) in held}
        for (replica, lacking), part in _missing(split[rows], made.replica_of, rows, keys, there, own).items():
            node = target // made.per_node if target // made.per_node in made.nodes[replica] else -1
            if (replica, node) not in heaps:
                heaps[replica, node] = [(sent[rank], rank) for rank in made.senders(replica, node)]
                heapify(heaps[replica, node])
            source = _least(heaps[replica, node], sent)
            sent[source] += len(part)
            messages.append(Message(source, target, tuple(part), lacking))
    return tuple(messages)


def _least(heap: list[tuple[int, int]], sent: Mapping[int, int]) -> int:
    """The rank of a heap of (rows sent, rank) that has sent least, of equal ones the first. What a rank has sent may
    have grown since it was entered: then it is entered anew, until the top is up to date."""
    while sent[heap[0][1]] != heap[0][0]:
        heapreplace(heap, (sent[heap[0][1]], heap[0][1]))
    return heap[0][1]


def _by_replica(rows: Numbers, replica_of: Mapping[int, int]) -> dict[int, Numbers]:
    """Rows by the replica that made them, in the order in which its first one stands."""
    found: dict[int, list[int]] = {}
    for row in rows:
        found.setdefault(replica_of[row], []).append(row)
    return {replica: tuple(part) for replica, part in found.items()}


def _missing(
    split: Mapping[int, Numbers],
    replica_of: Mapping[int, int],
    rows: Numbers,
    keys: tuple[str, ...],
    there: Mapping[str, set[int]],
    own: int | None,
) -> dict[tuple[int, tuple[str, ...]], Sequence[int]]:
    """(replica, tensors) -> the rows that a rank of replica `own` lacks of them, in the order of the first one.

    `split`: the rows by replica. A rank mostly has all of a replica's rows or none; only where it has some of them are
    they looked at one by one.
    """
    if not there:
        return {(replica, keys): part for replica, part in split.items() if replica != own}
    found: dict[tuple[int, tuple[str, ...]], Sequence[int]] = {}
    for replica, part in split.items():
        if replica == own:
            continue
        lacking = tuple(key for key in keys if key not in there or there[key].isdisjoint(part))
        if any(key not in lacking and not there[key].issuperset(part) for key in keys):
            break
        if lacking:
            found[replica, lacking] = part
    else:
        return found
    some: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for row in rows:
        lacking = tuple(key for key in keys if row not in there.get(key, ()))
        if lacking and replica_of[row] != own:
            some.setdefault((replica_of[row], lacking), []).append(row)
    return dict(some)
