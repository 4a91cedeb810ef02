"""The page of a run: curves, measured and predicted timeline, seconds, and samples. One file, nothing outside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from cost_models.estimate import PlanCost
from planner.pictures.curves import Curve, curve_html
from planner.pictures.lanes import shown_until_s
from planner.pictures.page import Picture, Table, document, figures, head, legend, section, table_section
from planner.pictures.run_files import RunFiles
from plans.cluster import GIB
from plans.plan import ExecutionPlan
from plans.timeline import Timeline

SHOWN_ITERATIONS = 3
SHOWN_SAMPLES = 8
SHOWN_LETTERS = 600
_CURVES = (
    ("reward, mean score per sample (points: evaluations)", "critic/score/mean", "val/score/mean"),
    ("response length, tokens (points: evaluations)", "response_length/mean", "val/response_length/mean"),
    ("KL to the reference, per token", "actor/reward_kl_penalty", ""),
    ("KL loss", "actor/kl_loss", ""),
    ("policy loss", "actor/pg_loss", ""),
    ("loss", "actor/loss", ""),
    ("value loss", "critic/vf_loss", ""),
    ("entropy", "actor/entropy", ""),
    ("gradient norm of the actor", "actor/grad_norm", ""),
    ("gradient norm of the critic", "critic/grad_norm", ""),
    ("learning rate", "actor/lr", ""),
    ("tokens per second and GPU", "perf/throughput", ""),
    ("seconds per iteration", "timing_s/step", ""),
    ("GPU memory, fullest rank, GiB", "perf/max_memory_allocated_gb", ""),
    ("host memory of all ranks, GiB", "perf/cpu_memory_used_gb", ""),
)


def run_page(run: RunFiles, cost: PlanCost, title: str) -> str:
    """The page as HTML text. cost: of the run's plan, as predicted."""
    body = [head(title, run.plan), f"<section>{figures(list(_figures(run, cost)))}{_curves(run)}</section>"]
    body += [legend(run.plan), *_timelines(run, cost), _seconds(run, cost), *_memory(run, cost), *_samples(run)]
    return document(title, body)


def _figures(run: RunFiles, cost: PlanCost) -> Iterator[tuple[str, str, str, str]]:
    metrics = run.metrics
    yield f"{len(metrics):,}", "iterations", "", ""
    if "timing_s/step" in metrics:
        measured = float(metrics["timing_s/step"].iloc[min(1, len(metrics) - 1) :].median())
        yield f"{measured:.4g} s", f"per iteration (median), predicted {cost.iteration_s:.4g} s", "", ""
    if "perf/throughput" in metrics:
        yield f"{metrics['perf/throughput'].median():,.0f}", "tokens per second and GPU", "", ""
    for name, words, table in (("critic/score/mean", "reward", metrics), ("val/score/mean", "score", run.evaluations)):
        if name in table:
            quarter = max(1, len(table) // 4) if table is metrics else 1
            first, last = table[name].head(quarter).mean(), table[name].tail(quarter).mean()
            part = "quarter of the run" if table is metrics else "evaluation"
            yield f"{last:.4g}", f"{words} of the last {part}, {first:.4g} of the first", "", ""


def _curves(run: RunFiles) -> str:
    drawn = []
    for title, name, marked in _CURVES:
        values = run.metrics.get(name, pd.Series(dtype=float))
        # An evaluation after n iterations stands where the n-th, whose number is n - 1, has ended.
        marks = run.evaluations.get(marked)
        if name == "perf/max_memory_allocated_gb" and not values.any():
            continue
        drawn.append(curve_html(Curve(title, values, None if marks is None else marks.set_axis(marks.index - 0.5))))
    return f'<div class="curves">{"".join(drawn)}</div>'


def _timelines(run: RunFiles, cost: PlanCost) -> Iterator[str]:
    pictures = [Picture(title="predicted", plan=run.plan, timeline=cost.timeline, memory=cost.memory)]
    if run.timeline is not None and run.timeline.spans:
        last = last_iterations(run.timeline, SHOWN_ITERATIONS)
        notes = (f"the last {len({span.iteration for span in last.spans})} iterations of the run",)
        pictures.insert(0, Picture(title="measured", plan=run.plan, timeline=last, notes=notes))
    until_s = max(shown_until_s(picture.timeline) for picture in pictures)
    return (section(picture, until_s) for picture in pictures)


def last_iterations(timeline: Timeline, count: int) -> Timeline:
    """The spans of the last `count` iterations, from zero."""
    numbers = sorted({span.iteration for span in timeline.spans})[-count:]
    spans = [span for span in timeline.spans if span.iteration in numbers]
    begin = min(span.start_s for span in spans)
    shifted = (replace(span, start_s=span.start_s - begin, end_s=span.end_s - begin) for span in spans)
    return replace(timeline, spans=tuple(shifted))


def _seconds(run: RunFiles, cost: PlanCost) -> str:
    """Predicted and measured seconds of every call, the first iteration left out: it warms up."""
    steady = run.metrics.iloc[min(1, len(run.metrics) - 1) :].mean()
    rows = [*((name, f"plan/{name}/measured_s", s) for name, s in cost.timeline.call_seconds().items())]
    rows.append(("iteration", "timing_s/step", cost.iteration_s))
    return table_section(
        Table(
            ("call", "predicted, s", "measured, s", "predicted / measured"),
            tuple(
                (name, f"{predicted:.3f}", f"{steady[key]:.3f}", f"{predicted / steady[key]:.2f}")
                for name, key, predicted in rows
                if key in steady and steady[key] > 0
            ),
        ),
        "Seconds",
    )


def _memory(run: RunFiles, cost: PlanCost) -> Iterator[str]:
    """Predicted and measured peak of every rank, both without CUDA's context, which torch does not see."""
    context = cost.engine.on(run.plan.cluster, run.plan.workload.dtype).context_bytes
    predicted = [(bytes_ - context) / GIB for bytes_ in cost.memory.by_rank]
    keys = {rank: f"plan/peak/rank_{rank}_gib" for rank in range(run.plan.cluster.size)}
    peaks = {rank: float(run.metrics[key].max()) for rank, key in keys.items() if key in run.metrics}
    rows = tuple(
        (f"rank {rank}", f"{predicted[rank]:.3f}", f"{peak:.3f}", f"{predicted[rank] / peak:.2f}")
        for rank, peak in peaks.items()
        if peak > 0
    )
    if rows:
        yield table_section(Table(("peak", "predicted, GiB", "measured, GiB", "predicted / measured"), rows), "Memory")


def _samples(run: RunFiles) -> Iterator[str]:
    evaluations = [line for line in run.evaluated if isinstance(line.get("samples"), list) and line["samples"]]
    if len(evaluations) > 1:
        yield _before_and_after(evaluations[0], evaluations[-1])
    if run.samples:
        newest = max(sample["iteration"] for sample in run.samples)
        shown = [sample for sample in run.samples if sample["iteration"] == newest][:SHOWN_SAMPLES]
        rows = tuple((_text(s.get("prompt")), _text(s.get("response")), _scores(s)) for s in shown)
        title = f"Samples of iteration {newest}"
        yield table_section(Table(("prompt", "response", "reward"), rows), title, "texts")


def _before_and_after(first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    rows = tuple(
        (_text(a.get("prompt")), _text(a.get("response")), _number(a.get("score")), _text(b.get("response")),
         _number(b.get("score")))
        for a, b in zip(first["samples"], last["samples"], strict=False)
        if isinstance(a, dict) and isinstance(b, dict)
    )  # fmt: skip
    names = (f"after {first['iteration']} iterations", "score", f"after {last['iteration']}", "score")
    return table_section(Table(("prompt", *names), rows[:SHOWN_SAMPLES]), "Evaluations", "texts")


def _scores(sample: Mapping[str, Any]) -> str:
    found = {name: value for name, value in sample.items() if name.startswith("rewards")}
    if list(found) == ["rewards"]:
        return _number(found["rewards"])
    return "\n".join(f"{name.removeprefix('rewards_')}: {_number(value)}" for name, value in found.items())


def _text(value: object) -> str:
    words = str(value or "")
    return words if len(words) <= SHOWN_LETTERS else f"{words[:SHOWN_LETTERS]} ..."


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "-"


def title_of(plan: ExecutionPlan, folder: str) -> str:
    """What the page is called."""
    return plan.notes or f"{plan.workload.graph.name} in {folder}"
