"""A timeline as rectangles on lanes: GPUs that do the same all the time share a lane, lanes that do the same share a
rectangle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from plans.cluster import ClusterSpec
from plans.timeline import Span, Timeline

SHOWN_PERIODS = 3
StepKey = tuple[str, str, int]  # name, kind, iteration


@dataclass(frozen=True, slots=True)
class Lane:
    """The GPUs `first` to `last` (global ranks)."""

    first: int
    last: int

    @property
    def gpus(self) -> int:
        """GPUs of the lane."""
        return self.last - self.first + 1

    def name(self, cluster: ClusterSpec) -> str:
        """The lane as a plan file names meshes."""
        per_node = cluster.gpus_per_node
        a, b = self.first // per_node, self.last // per_node
        nodes = f"node {a}" if a == b else f"nodes {a}-{b}"
        first, last = self.first % per_node, self.last % per_node
        if a != b or (first, last) == (0, per_node - 1):
            return nodes
        return f"{nodes} gpu {first}" if first == last else f"{nodes} gpus {first}-{last}"


@dataclass(frozen=True, slots=True)
class Block:
    """One step on the neighbouring lanes `top` to `bottom`; a measured step from its first rank's start to its last
    rank's end."""

    name: str
    kind: str
    iteration: int
    start_s: float
    end_s: float
    top: int
    bottom: int


def lanes(spans: Sequence[Span], cluster: ClusterSpec) -> tuple[Lane, ...]:
    """Runs of ranks that take part in the same steps. A lane of several nodes holds whole nodes only."""
    doing: list[set[StepKey]] = [set() for _ in range(cluster.size)]
    for span in spans:
        for rank in span.ranks:
            doing[rank].add((span.name, span.kind, span.iteration))
    per_node = cluster.gpus_per_node
    found: list[Lane] = []
    start = 0
    for rank in range(1, cluster.size + 1):
        if rank < cluster.size and doing[rank] == doing[start]:
            continue
        found += _whole_nodes(start, rank - 1, per_node)
        start = rank
    return tuple(found)


def _whole_nodes(first: int, last: int, per_node: int) -> list[Lane]:
    """Cut a run of ranks at the borders of its whole nodes."""
    inner = -(-first // per_node) * per_node, (last + 1) // per_node * per_node
    if inner[0] >= inner[1]:
        border = inner[0]
        return [Lane(a, b) for a, b in ((first, min(last, border - 1)), (max(first, border), last)) if a <= b]
    parts = (first, inner[0] - 1), (inner[0], inner[1] - 1), (inner[1], last)
    return [Lane(a, b) for a, b in parts if a <= b]


def blocks(spans: Iterable[Span], on: Sequence[Lane]) -> list[Block]:
    """Rectangles of the spans, in order of start; ranks of one step that are not neighbours give several."""
    by_step: dict[StepKey, list[Span]] = {}
    for span in spans:
        by_step.setdefault((span.name, span.kind, span.iteration), []).append(span)
    found: list[Block] = []
    for (name, kind, iteration), parts in by_step.items():
        previous: Block | None = None
        for i, lane in enumerate(on):
            here = [p for p in parts if lane.first in p.ranks or (len(p.ranks) < lane.gpus and _inside(p, lane))]
            if not here:
                continue
            start, end = min(p.start_s for p in here), max(p.end_s for p in here)
            if previous and previous.bottom == i - 1 and (previous.start_s, previous.end_s) == (start, end):
                found[-1] = previous = replace(previous, bottom=i)
            else:
                previous = Block(name, kind, iteration, start, end, i, i)
                found.append(previous)
    return sorted(found, key=lambda b: (b.start_s, b.top))


def _inside(span: Span, lane: Lane) -> bool:
    return any(lane.first <= rank <= lane.last for rank in span.ranks)


def continued(timeline: Timeline, until_s: float) -> list[Span]:
    """Spans up to a time. A predicted timeline goes on as it ended: its last iteration repeats every period."""
    spans = list(timeline.spans)
    if timeline.source != "predicted" or timeline.period_s <= 0 or not spans:
        return [span for span in spans if span.start_s < until_s]
    last = max(span.iteration for span in spans)
    pattern = timeline.iteration(last)
    repeat = 1
    while min(span.start_s for span in pattern) + repeat * timeline.period_s < until_s:
        shift = repeat * timeline.period_s
        spans += [
            replace(s, iteration=last + repeat, start_s=s.start_s + shift, end_s=s.end_s + shift) for s in pattern
        ]
        repeat += 1
    return [span for span in spans if span.start_s < until_s]


def shown_until_s(timeline: Timeline) -> float:
    """Seconds that a picture of one plan shows: three periods of a prediction, all of a measurement."""
    if timeline.source == "predicted" and timeline.period_s > 0:
        return SHOWN_PERIODS * timeline.period_s
    return max((span.end_s for span in timeline.spans), default=1.0)
