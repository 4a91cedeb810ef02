"""`realplan show` and `realplan trace`."""

from __future__ import annotations

import os
from pathlib import Path

from cost_models.estimate import PlanCost, cost_plan
from planner.cli.engine_words import plan_engine
from planner.cli.output import limits_note, say, write
from plans.errors import PlanError
from plans.files import check_target
from plans.legal import legal_plan
from plans.plan import ExecutionPlan
from plans.render import render_plan
from plans.run_output import PLAN
from plans.timeline import FORMAT, Timeline, load_timeline


def show_command(path: Path, *, html: Path | None, measured: Path | None) -> int:
    """Print a legal plan with its predicted timeline, or write both timelines as a page."""
    if html:
        check_target(html)
    plan = legal_plan(path)
    cost = cost_plan(plan, plan_engine(plan))
    run = _measured(plan, measured) if measured else None
    if html:
        from planner.pictures.page import Picture, render_page

        pictures = [Picture(title="predicted", plan=plan, timeline=cost.timeline, memory=cost.memory)]
        pictures += [Picture(title="measured", plan=plan, timeline=run)] if run else []
        write(html, render_page(pictures, plan.notes or path.stem))
        return 0
    print(render_plan(plan, cost.timeline))
    if note := limits_note(plan):
        say(note)
    if run:
        print(_beside(cost, run))
    return 0


def _measured(plan: ExecutionPlan, path: Path) -> Timeline:
    timeline = load_timeline(path)
    last = max((max(span.ranks) for span in timeline.spans), default=0)
    if last >= plan.cluster.size:
        reason = f"{path}: the timeline has rank {last}, the plan has ranks 0-{plan.cluster.size - 1}"
        raise PlanError(reason, "the plan that this run executed")
    return timeline


def _beside(cost: PlanCost, run: Timeline) -> str:
    """Predicted and measured seconds of every step."""
    predicted, measured = cost.timeline.call_seconds(), run.call_seconds()
    lines = [f"{'step':40}{'predicted s':>13}{'measured s':>13}{'error':>9}"]
    for name in dict.fromkeys([*predicted, *measured]):
        lines.append(_error(name, predicted.get(name), measured.get(name)))
    return "\n".join([*lines, _error("iteration", cost.iteration_s, run.period_s)])


def _error(name: str, predicted: float | None, measured: float | None) -> str:
    words = ["-" if value is None else f"{value:.3f}" for value in (predicted, measured)]
    error = f"{predicted / measured - 1.0:+.1%}" if predicted is not None and measured else ""
    return f"{name[:39]:40}{words[0]:>13}{words[1]:>13}{error:>9}"


def trace_command(path: Path, *, measured: Path | None, output: Path | None) -> int:
    """Write the predicted timeline of a plan, or a measured one, as a trace."""
    if _is_timeline(path):
        path, measured = path.parent / PLAN, measured or path
        if not os.path.exists(path):
            raise PlanError(f"no plan beside `{measured}`", f"realplan trace PLAN --timeline {measured}")
    target = output or (measured or path).with_suffix(".trace.json")
    check_target(target)
    plan = legal_plan(path)
    timeline = _measured(plan, measured) if measured else cost_plan(plan, plan_engine(plan)).timeline
    from planner.pictures.trace import trace_json

    write(target, trace_json(timeline, plan))
    return 0


def _is_timeline(path: Path) -> bool:
    if not os.path.isfile(path):  # opening a pipe would wait for who writes to it
        return False
    try:
        with path.open(encoding="utf-8") as file:
            return FORMAT in file.read(200)
    except (OSError, UnicodeDecodeError):
        return False
