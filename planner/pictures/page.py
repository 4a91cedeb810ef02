"""One HTML page with the pictures of one plan, or of several under each other on one time axis.

The page is one file without references to anything outside it; it reads without its script, which adds the tooltip,
the zoom and labels that fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from cost_models.memory.moments import MemoryProfile
from planner.pictures.idle import idle_by_mesh, idle_share
from planner.pictures.lanes import shown_until_s
from planner.pictures.page_style import ERRORS, HATCH, SCRIPT, STYLE
from planner.pictures.svg import PALETTE, memory_svg, timeline_svg
from plans.plan import ExecutionPlan
from plans.render import settings
from plans.timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What the page shows of one plan. memory: None where it is not modelled (a measured timeline)."""

    title: str
    plan: ExecutionPlan
    timeline: Timeline
    memory: MemoryProfile | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """A table for the head of the page; the first column is words, the others are figures."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def render_page(pictures: Sequence[Picture], title: str, table: Table | None = None) -> str:
    """The page as HTML text. With one picture its call table stands below it."""
    assert pictures, "a page needs a picture"
    plan = pictures[0].plan
    until_s = _until_s(pictures)
    body = [
        head(title, plan),
        table_section(table) if table else "",
        legend(plan),
        *(section(picture, until_s) for picture in pictures),
        calls_section(pictures[0]) if len(pictures) == 1 else "",
    ]
    return document(title, body)


def document(title: str, body: Sequence[str]) -> str:
    """A whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<script>{ERRORS}</script>{HATCH}<main>{''.join(body)}</main>"
        f'<div id="tip" role="tooltip"></div><script>{SCRIPT}</script></body></html>\n'
    )


def _until_s(pictures: Sequence[Picture]) -> float:
    """One plan: all of its timeline. Several: a period of the slowest, during which faster ones go on."""
    if len(pictures) == 1:
        return shown_until_s(pictures[0].timeline)
    periods = [picture.timeline.period_s or shown_until_s(picture.timeline) for picture in pictures]
    return max(1.02 * max(periods), 2.0 * min(periods))


def head(title: str, plan: ExecutionPlan) -> str:
    """The head of the page: what is run on what."""
    w, c = plan.workload, plan.cluster
    samples = f"{w.batch_size} prompts" + (f" x {w.group_size} samples" if w.group_size > 1 else "")
    models = ", ".join(f"{role} {w.models[role].name}" for role in w.graph.roles)
    words = (
        f"{w.graph.name.upper()}: {samples}, {w.prompt_tokens} + {w.response_tokens} tokens, "
        f"{w.minibatches} minibatches, {w.dtype}. {models}. {c.size} x {c.gpu.name} in {c.nodes} nodes of "
        f"{c.gpus_per_node}."
    )
    return f'<header><h1>{escape(title)}</h1><p class="soft">{escape(words)}</p></header>'


def legend(plan: ExecutionPlan) -> str:
    """The colours of the calls, and the zoom of all timelines."""
    keys = [(f"k{i % PALETTE}", call.name) for i, call in enumerate(plan.workload.graph.calls)]
    keys += [("reallocate", "reallocation of weights"), ("transfer", "transfer of a batch"), ("idle", "idle")]
    words = "".join(
        f'<span><i><svg class="{kind}"><rect width="14" height="14" y="{9 if kind == "transfer" else 0}"/></svg></i>'
        f"{escape(name)}</span>"
        for kind, name in keys
    )
    zoom = '<label class="zoom">zoom <input id="zoom" type="range" min="1" max="12" step="0.5" value="1"></label>'
    return f'<div class="legend">{words}{zoom}</div>'


def section(picture: Picture, until_s: float) -> str:
    """A plan over `until_s` seconds, and its memory."""
    memory = ""
    if picture.memory:
        bars = memory_svg(picture.plan, picture.memory)
        memory = f'<h3>Memory of the fullest GPU by moment, GiB</h3><div class="grid">{bars}</div>'
    drawing = timeline_svg(picture.plan, picture.timeline, picture.memory, until_s)
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in picture.notes)
    return (
        f"<section><h2>{escape(picture.title)}</h2>{_figures(picture)}"
        f'<div class="grid">{drawing}</div>{memory}{notes}</section>'
    )


def figures(found: Sequence[tuple[str, str, str, str]]) -> str:
    """Large figures, each with words below, a class and words for who asks."""
    cells = "".join(
        f'<div title="{escape(more)}"><b class="{kind}">{escape(figure)}</b><span>{escape(words)}</span></div>'
        for figure, words, kind, more in found
    )
    return f'<div class="figures">{cells}</div>'


def _figures(picture: Picture) -> str:
    plan, timeline = picture.plan, picture.timeline
    idle = "\n".join(f"{mesh}: {share:.1%} idle" for mesh, share in idle_by_mesh(timeline, plan).items())
    found = [(f"{timeline.period_s:.4g} s", f"per iteration, {timeline.source}", "", "")]
    found.append((f"{idle_share(timeline, plan.cluster):.1%}", "of GPU time idle", "", idle))
    if picture.memory:
        capacity, peak = plan.cluster.gpu.memory_gib, picture.memory.peak_gib
        where = f"peak of {capacity:g} GiB, in {picture.memory.peak_step}"
        found.append((f"{peak:.1f} GiB", where, "bad" if peak > capacity else "", ""))
    return figures(found)


def table_section(table: Table, title: str = "", kind: str = "table") -> str:
    """A table with its title; kind: a class of the style sheet."""
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    columns = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<section class="{kind}">{heading}<table><tr>{columns}</tr>{rows}</table></section>'


def calls_section(picture: Picture) -> str:
    """The calls of a plan with their seconds."""
    seconds = picture.timeline.call_seconds()
    plan = picture.plan
    rows = "".join(
        f"<tr><td>{escape(p.call)}</td><td>{escape(p.mesh.text(plan.cluster))}</td>"
        f"<td>{escape(p.strategy.degrees)}</td><td>{escape(settings(p))}</td>"
        f"<td>{seconds.get(p.call, 0.0):.2f}</td></tr>"
        for p in plan.calls
    )
    columns = "<tr><th>call</th><th>mesh</th><th>strategy</th><th>settings</th><th>seconds</th></tr>"
    return f'<section class="table"><table class="calls">{columns}{rows}</table></section>'
