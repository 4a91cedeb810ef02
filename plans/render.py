"""A plan and its timeline as text of at most 100 columns: which call runs where, how it is cut, and when."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import pairwise

from plans.cluster import ClusterSpec
from plans.graph import CallKind
from plans.plan import ExecutionPlan, PlannedCall
from plans.strategy import SETTINGS
from plans.timeline import Span, Timeline

TABLE_WIDTH = 100
_KINDS = {
    CallKind.GENERATE: "sample responses",
    CallKind.INFERENCE: "score",
    CallKind.TRAIN_STEP: "train",
    CallKind.FUNCTION: "Python function",
}


def render_plan(plan: ExecutionPlan, timeline: Timeline | None = None) -> str:
    """Header, one row per call in run order, and with a timeline the GPUs over time."""
    parts = [_header(plan), _table(plan, timeline)]
    if timeline:
        parts.append(render_timeline(timeline, plan.cluster, plan))
    return "\n\n".join(parts) + "\n"


def _header(plan: ExecutionPlan) -> str:
    w, c = plan.workload, plan.cluster
    algorithm = w.graph.name.upper()
    samples = f"{w.batch_size} prompts" + (f" x {w.group_size} samples" if w.group_size > 1 else "")
    tokens = f"{w.prompt_tokens} + {w.response_tokens} tokens"
    if not (w.prompts.full and w.responses.full):
        tokens += f" (mean {w.prompts.mean:.0f} + {w.responses.mean:.0f})"
    nodes = f"{c.nodes} nodes of {c.gpus_per_node}, {c.inter_node_gbps:g} GB/s per GPU between nodes"
    lines = [
        f"{algorithm}: {samples}, {tokens}, {w.minibatches} minibatches, {w.dtype}",
        f"{c.size} x {c.gpu.name} ({nodes})",
        "models: " + ", ".join(f"{role} {w.models[role].name}" for role in w.graph.roles),
    ]
    if w.lora:
        lines.append(f"actor trained through {w.lora.words}")
    if plan.estimate:
        e = plan.estimate
        lines.append(
            f"estimate ({e.engine}): {e.iteration_s:.4g} s per iteration, peak {e.peak_gib:.1f} of "
            f"{c.gpu.memory_gib:g} GiB ({e.peak_at})"
        )
    return "\n".join(_wrap(line) for line in lines)


def _wrap(line: str) -> str:
    return "\n".join(textwrap.wrap(line, TABLE_WIDTH, subsequent_indent="    "))


def _table(plan: ExecutionPlan, timeline: Timeline | None) -> str:
    seconds = timeline.call_seconds() if timeline else {}
    rows = [("", "call", "does", "where", "dp tp pp", "settings", "seconds")]
    for mark, planned in zip(marks(plan), plan.calls, strict=True):
        s = planned.strategy
        time = f"{seconds[planned.call]:.2f}" if planned.call in seconds else ""
        degrees = f"{s.dp:>2} {s.tp:>2} {s.pp:>2}"
        kind = _KINDS[plan.workload.graph.call(planned.call).kind]
        rows.append((mark, planned.call, kind, planned.mesh.text(plan.cluster), degrees, settings(planned), time))
    for call in plan.workload.graph.calls:
        if not call.model:
            host = plan.workload.graph.host(call.name)
            time = f"{seconds[call.name]:.2f}" if call.name in seconds else ""
            rows.append(("", call.name, _KINDS[call.kind], f"with {host}", "", "", time))
    widths = [max(len(row[i]) for row in rows) for i in range(7)]
    widths[5] = max(8, min(widths[5], TABLE_WIDTH - sum(widths[:5]) - widths[6] - 12))
    return "\n".join(_row(row, widths) for row in rows)


def _row(row: Sequence[str], widths: Sequence[int]) -> str:
    """A table row; settings that are too wide go on in lines below."""
    cut = textwrap.wrap(row[5], widths[5], break_on_hyphens=False) or [""]
    first = "  ".join(cell.ljust(w) for cell, w in zip((*row[:5], cut[0]), widths[:6], strict=True))
    lines = [(first + "  " + row[6].rjust(widths[6])).rstrip()]
    indent = sum(widths[:5]) + 10
    return "\n".join([*lines, *(" " * indent + more for more in cut[1:])])


def settings(planned: PlannedCall) -> str:
    """The settings that differ from the defaults, in words."""
    words = [setting.words(getattr(planned.strategy, name)) for name, setting in SETTINGS.items()]
    if planned.lag:
        words.append(f"lag {planned.lag}")
    return ", ".join(word for word in words if word)


def marks(plan: ExecutionPlan) -> list[str]:
    """One letter per planned call, for the timeline."""
    used: list[str] = []
    for planned in plan.calls:
        initials = "".join(part[0] for part in planned.call.split("_"))
        candidates = initials[-1:] + planned.call.replace("_", "") + "abcdefghijklmnopqrstuvwxyz"
        if plan.workload.graph.call(planned.call).kind is CallKind.TRAIN_STEP:
            candidates = candidates[1:].upper()
        used.append(next(letter for letter in candidates if letter not in used))
    return used


def render_timeline(timeline: Timeline, cluster: ClusterSpec, plan: ExecutionPlan) -> str:
    """GPUs from top to bottom, time from left to right, over two steady iterations."""
    shown = [s for s in timeline.spans if s.kind in ("call", "reallocate", "function")]
    if not shown:
        return ""
    begin = min(s.start_s for s in shown if s.iteration == 1) if any(s.iteration == 1 for s in shown) else 0.0
    end = begin + 2 * timeline.period_s
    lanes = _lanes(shown, cluster)
    label = max(len(name) for name, _ in lanes) + 1
    columns = TABLE_WIDTH - label - 2
    letters = {planned.call: mark for mark, planned in zip(marks(plan), plan.calls, strict=True)}
    lines = [f"GPUs over time, {begin:.1f} s to {end:.1f} s ({(end - begin) / columns:.2g} s per character)"]
    for name, rank in lanes:
        cells = ["."] * columns
        for span in shown:
            if rank in span.ranks:
                _paint(cells, span, begin, end, letters)
        lines.append(f"{name.ljust(label)}|{''.join(cells)}|")
    key = [f"{mark} {call}" for call, mark in letters.items()] + ["= reallocation", ". idle"]
    return "\n".join([*lines, _wrap("key: " + ", ".join(key) + "; upper case trains")])


def _paint(cells: list[str], span: Span, begin: float, end: float, letters: dict[str, str]) -> None:
    scale = len(cells) / (end - begin)
    first = max(0, round((span.start_s - begin) * scale))
    last = min(len(cells), max(first + (span.kind == "call"), round((span.end_s - begin) * scale)))
    mark = letters.get(span.name, "f") if span.kind != "reallocate" else "="
    for i in range(first, last):
        cells[i] = mark


def _lanes(spans: Sequence[Span], cluster: ClusterSpec) -> list[tuple[str, int]]:
    """Runs of ranks that do the same all the time, each with a representative rank."""
    per_node = cluster.gpus_per_node
    busy: list[set[int]] = [set() for _ in range(cluster.size)]
    for i, span in enumerate(spans):
        for rank in span.ranks:
            busy[rank].add(i)
    lanes: list[tuple[str, int]] = []
    start = 0
    for rank in range(1, cluster.size + 1):
        if rank == cluster.size or busy[rank] != busy[start]:
            lanes.append((_lane_name(start, rank - 1, per_node), start))
            start = rank
    return lanes


def _lane_name(first: int, last: int, per_node: int) -> str:
    if first % per_node == 0 and (last + 1) % per_node == 0:
        a, b = first // per_node, last // per_node
        return f"node {a}" if a == b else f"nodes {a}-{b}"
    a, b = first % per_node, last % per_node
    return f"node {first // per_node} gpu {a}" if first == last else f"node {first // per_node} gpus {a}-{b}"


def rank_ranges(ranks: Sequence[int]) -> str:
    """Ascending ranks as `0-7, 16-23`."""
    starts = [ranks[0], *(b for a, b in pairwise(ranks) if b != a + 1)]
    ends = [*(a for a, b in pairwise(ranks) if b != a + 1), ranks[-1]]
    return ", ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in zip(starts, ends, strict=True))
