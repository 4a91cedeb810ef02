"""Pictures of a plan as inline SVG: GPUs over time, and memory by moment.

Positions along the width are percentages, heights and text are pixels: the picture takes whatever width it is given
and its letters keep their size. Words about a rectangle are its `<title>`, which the page's script shows on hover.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

from cost_models.memory.moments import MemoryProfile, Moment
from planner.pictures.lanes import Block, Lane, blocks, continued, lanes
from plans.cluster import GIB
from plans.plan import ExecutionPlan
from plans.program import StepKind
from plans.render import settings
from plans.timeline import Timeline

PALETTE = 8
SHOWN_KINDS = (StepKind.CALL, StepKind.FUNCTION, StepKind.REALLOCATE, StepKind.TRANSFER, StepKind.LOAD)
AXIS = 22
_LANE_MIN, _LANES_LEAST, _LANES_MOST = 28.0, 90.0, 260.0
_TRANSFER = 5.0
_MEMORY_ROW = 20


def timeline_svg(plan: ExecutionPlan, timeline: Timeline, memory: MemoryProfile | None, until_s: float) -> str:
    """Lanes of GPUs from top to bottom (as high as they have GPUs), `until_s` seconds from left to right.

    Returns the labels of the lanes and the drawing, as two cells of the page's grid.
    """
    spans = [s for s in continued(timeline, until_s) if s.kind in SHOWN_KINDS]
    on = lanes(spans, plan.cluster)
    tops = _tops(on)
    height = tops[-1] + AXIS
    peaks = _peaks(memory)
    drawn = [_block(block, plan, peaks, tops, until_s) for block in blocks(spans, on)]
    rows = "".join(
        f'<rect class="idle" x="0" y="{top:.1f}" width="100%" height="{bottom - top - 1:.1f}"/>'
        for top, bottom in pairwise(tops)
    )
    labels = "".join(
        f'<span style="top:{top:.1f}px;height:{bottom - top - 1:.1f}px">{escape(lane.name(plan.cluster))}</span>'
        for lane, (top, bottom) in zip(on, pairwise(tops), strict=True)
    )
    return (
        f'<div class="lanes" style="height:{height:.0f}px">{labels}</div>'
        f'<div class="scroll"><svg class="time" height="{height:.0f}" role="img" '
        f'aria-label="GPUs over time">{rows}{"".join(drawn)}{_axis(until_s, tops[-1])}</svg></div>'
    )


def _tops(on: Sequence[Lane]) -> list[float]:
    """Upper edges of the lanes, and the lower edge of the last: in proportion to GPUs, but never too thin to read."""
    gpus = sum(lane.gpus for lane in on)
    height = min(_LANES_MOST, _LANES_LEAST + _LANE_MIN * len(on))
    edges = [0.0]
    for lane in on:
        edges.append(edges[-1] + max(_LANE_MIN, height * lane.gpus / gpus))
    return edges


def _peaks(memory: MemoryProfile | None) -> dict[str, float]:
    """Step -> GiB on its fullest GPU."""
    return {m.step.name: float(m.bytes_by_rank.max()) / GIB for m in memory.moments} if memory else {}


def call_class(plan: ExecutionPlan, name: str, kind: str) -> str:
    """CSS class of a step: calls and functions by their place in the graph, so that plans of one graph agree."""
    names = [call.name for call in plan.workload.graph.calls]
    return f"k{names.index(name) % PALETTE}" if name in names else escape(kind)


def _block(block: Block, plan: ExecutionPlan, peaks: Mapping[str, float], tops: Sequence[float], until_s: float) -> str:
    x, width = 100.0 * block.start_s / until_s, 100.0 * (block.end_s - block.start_s) / until_s
    y, height = tops[block.top], tops[block.bottom + 1] - tops[block.top] - 1.0
    if block.kind == StepKind.TRANSFER:
        y, height = y + height - _TRANSFER, _TRANSFER
    kind = call_class(plan, block.name, block.kind)
    place = f'x="{x:.3f}%" y="{y:.1f}" width="{max(width, 0.05):.3f}%" height="{height:.1f}"'
    label = ""
    if width > 0.5 and block.kind in (StepKind.CALL, StepKind.FUNCTION):
        words = f'{escape(block.name)} <tspan class="n">{block.iteration}</tspan>'
        label = f'<text x="5" y="{min(height / 2 + 4, 60):.0f}">{words}</text>'
    title = escape(_words(block, plan, peaks.get(block.name)), quote=False)
    return f'<svg class="b {kind}" {place} tabindex="0"><title>{title}</title><rect/>{label}</svg>'


def _words(block: Block, plan: ExecutionPlan, gib: float | None) -> str:
    lines = [f"{block.name}, iteration {block.iteration}"]
    lines.append(f"{block.start_s:.2f} s to {block.end_s:.2f} s: {seconds_text(block.end_s - block.start_s)}")
    planned = next((p for p in plan.calls if p.call == block.name), None)
    if planned:
        lines.append(f"{planned.mesh.text(plan.cluster)}: {planned.strategy.degrees}")
        lines += [words] if (words := settings(planned)) else []
    if gib is not None:
        lines.append(f"{gib:.1f} of {plan.cluster.gpu.memory_gib:g} GiB on the fullest GPU")
    return "\n".join(lines)


def seconds_text(seconds: float) -> str:
    """Seconds with three significant figures; milliseconds below a tenth."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds:.3g} s"


def ticks(until: float, wanted: int = 8) -> list[float]:
    """Round values from 0 to `until`, 1, 2 or 5 times a power of ten apart."""
    rough = until / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [i * step for i in range(int(until / step + 1e-9) + 1)]


def _axis(until_s: float, top: float) -> str:
    parts = []
    for tick in ticks(until_s):
        x = 100.0 * tick / until_s
        anchor = "start" if x < 1 else "end" if x > 97 else "middle"
        parts.append(f'<line class="tick" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{top + 4:.0f}"/>')
        parts.append(f'<text class="axis" x="{x:.2f}%" y="{top + 17:.0f}" text-anchor="{anchor}">{tick:g} s</text>')
    return f'<g class="ticks">{"".join(parts)}</g>'


def memory_svg(plan: ExecutionPlan, memory: MemoryProfile) -> str:
    """One bar per moment: GiB on its fullest GPU, with a line at the capacity; two cells of the page's grid."""
    capacity = plan.cluster.gpu.memory_gib
    most = 1.08 * max(capacity, memory.peak_gib)
    height = _MEMORY_ROW * len(memory.moments) + AXIS
    labels, bars = [], []
    for i, moment in enumerate(memory.moments):
        y = i * _MEMORY_ROW
        name = escape(moment.step.name.replace("reallocate ", "\u2192 "))
        labels.append(f'<span style="top:{y}px;height:{_MEMORY_ROW - 2}px">{name}</span>')
        bars.append(_memory_bar(plan, moment, y, most))
    x = 100.0 * capacity / most
    line = f'<line class="capacity" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{height - AXIS + 4}"/>'
    words = f'<text class="axis" x="{x:.2f}%" y="{height - 5}" text-anchor="end">{capacity:g} GiB per GPU</text>'
    return (
        f'<div class="lanes" style="height:{height}px">{"".join(labels)}</div>'
        f'<svg class="memory" height="{height}" role="img" aria-label="memory by moment">'
        f"{''.join(bars)}{line}{words}</svg>"
    )


def _memory_bar(plan: ExecutionPlan, moment: Moment, y: float, most: float) -> str:
    gib = float(moment.bytes_by_rank.max()) / GIB
    width, bar = 100.0 * gib / most, _MEMORY_ROW - 3
    terms = [f"{name}: {size / GIB:.2f} GiB" for name, size in list(moment.terms.items())[:6]]
    rank = int(moment.bytes_by_rank.argmax())
    title = "\n".join([f"{moment.step.name}: {gib:.1f} GiB on rank {rank}", *terms])
    kind = call_class(plan, moment.step.name, moment.step.kind)
    text = f'<text class="axis" x="100%" y="{y + 13}" text-anchor="end">{gib:.1f}</text>'
    over = " over" if gib > plan.cluster.gpu.memory_gib else ""
    place = f'x="0" y="{y}" width="{width:.2f}%" height="{bar}"'
    words = escape(title, quote=False)
    return f'<svg class="b {kind}{over}" {place} tabindex="0"><title>{words}</title><rect/></svg>{text}'
