"""A timeline as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open.

A process is a node, a thread a GPU. Steps that hold GPUs are complete events on every GPU they hold; transfers hold
nobody and may overlap calls, so that they are asynchronous events of the nodes that take part (Trace Event Format,
sections "Complete Events" and "Async Events").
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from plans.plan import ExecutionPlan
from plans.program import StepKind
from plans.render import settings
from plans.timeline import Span, Timeline

# Names of the colour table that both viewers share.
COLORS = {
    StepKind.REALLOCATE: "terrible",
    StepKind.TRANSFER: "yellow",
    StepKind.LOAD: "grey",
    StepKind.OFFLOAD: "grey",
    StepKind.RELEASE: "white",
    StepKind.FUNCTION: "olive",
}
CALL_COLORS = (
    "thread_state_running",
    "rail_response",
    "rail_animation",
    "good",
    "rail_load",
    "thread_state_iowait",
    "cq_build_passed",
    "startup",
)


def trace_json(timeline: Timeline, plan: ExecutionPlan) -> str:
    """The timeline of a plan as Chrome trace JSON; times in microseconds, numbers of a step in `args`."""
    per_node = plan.cluster.gpus_per_node
    events: list[dict[str, Any]] = [*_names(plan)]
    for number, span in enumerate(timeline.spans):
        head = {"name": span.name, "cat": span.kind, "args": _numbers(span, plan), "cname": _color(span, plan)}
        begin, length = _us(span.start_s), _us(span.duration_s)
        if span.kind == StepKind.TRANSFER:
            for node in sorted({rank // per_node for rank in span.ranks}):
                place = {"pid": node, "tid": 0, "id": f"{number}.{node}"}
                events += [{**head, **place, "ph": ph, "ts": ts} for ph, ts in (("b", begin), ("e", begin + length))]
            continue
        for rank in span.ranks:
            place = {"pid": rank // per_node, "tid": rank % per_node}
            events.append({**head, **place, "ph": "X", "ts": begin, "dur": length})
    lines = ",\n".join(json.dumps(event) for event in events)
    about = {"source": timeline.source, "period_s": timeline.period_s}
    return f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(about)}, "traceEvents": [\n{lines}\n]}}\n'


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 1)


def _names(plan: ExecutionPlan) -> Iterator[dict[str, Any]]:
    def about(name: str, node: int, gpu: int, args: dict[str, Any]) -> dict[str, Any]:
        return {"name": name, "ph": "M", "pid": node, "tid": gpu, "args": args}

    for node in range(plan.cluster.nodes):
        yield about("process_name", node, 0, {"name": f"node {node}"})
        yield about("process_sort_index", node, 0, {"sort_index": node})
        for gpu in range(plan.cluster.gpus_per_node):
            yield about("thread_name", node, gpu, {"name": f"gpu {gpu}"})
            yield about("thread_sort_index", node, gpu, {"sort_index": gpu})


def _color(span: Span, plan: ExecutionPlan) -> str:
    names = [planned.call for planned in plan.calls]
    if span.name in names:
        return CALL_COLORS[names.index(span.name) % len(CALL_COLORS)]
    return COLORS.get(StepKind(span.kind), "grey") if span.kind in set(StepKind) else "grey"


def _numbers(span: Span, plan: ExecutionPlan) -> dict[str, Any]:
    numbers: dict[str, Any] = {"iteration": span.iteration, "seconds": round(span.duration_s, 6)}
    numbers["gpus"] = len(span.ranks)
    planned = next((p for p in plan.calls if p.call == span.name), None)
    if planned:
        numbers |= {"mesh": planned.mesh.text(plan.cluster), "strategy": planned.strategy.degrees}
        numbers["settings"] = settings(planned)
    return numbers
