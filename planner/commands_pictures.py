"""What the commands that look at plans do, once their options are parsed. Data goes to stdout, words to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from cost_models.engines.engine import Engine
from cost_models.estimate import PlanCost, cost_plan
from planner.baselines import Contender
from planner.engine_words import engine_of, plan_engine
from planner.limits import Limits
from planner.loading import legal_plan
from planner.pictures import headline as published
from planner.pictures.compare import baselines as all_baselines
from planner.pictures.compare import compare, compare_page, render_rows
from planner.pictures.diff import changes, effects, render_diff
from planner.pictures.page import Picture, render_page
from planner.pictures.trace import trace_json
from planner.pricing import build_space
from planner.progress import SearchProgress
from planner.request import check_effort
from planner.search.portfolio import search
from planner.tidy import tidy
from plans.errors import Infeasible, PlanError
from plans.files import write_atomically
from plans.plan import ExecutionPlan
from plans.render import render_plan
from plans.timeline import FORMAT, Timeline, load_timeline


def show_command(path: Path, *, html: Path | None, measured: Path | None) -> int:
    """Print a legal plan with its predicted timeline, or write both timelines as a page."""
    plan = legal_plan(path)
    cost = cost_plan(plan, plan_engine(plan))
    run = _measured(plan, measured) if measured else None
    if html:
        pictures = [Picture(title="predicted", plan=plan, timeline=cost.timeline, memory=cost.memory)]
        pictures += [Picture(title="measured", plan=plan, timeline=run)] if run else []
        _write(html, render_page(pictures, plan.notes or path.stem))
        return 0
    print(render_plan(plan, cost.timeline))
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
        path, measured = path.parent / "plan.json", measured or path
        if not path.exists():
            raise PlanError(f"no plan beside `{measured}`", f"realplan trace PLAN --timeline {measured}")
    plan = legal_plan(path)
    timeline = _measured(plan, measured) if measured else cost_plan(plan, plan_engine(plan)).timeline
    source = measured or path
    _write(output or source.with_suffix(".trace.json"), trace_json(timeline, plan))
    return 0


def _is_timeline(path: Path) -> bool:
    try:
        with path.open() as file:
            return FORMAT in file.read(200)
    except (OSError, UnicodeDecodeError):
        return False


def compare_command(paths: Sequence[Path], *, baselines: bool, html: Path | None, engine: str, as_json: bool) -> int:
    """The table of several plans and, where asked, of the baselines for the first one's workload."""
    plans = [legal_plan(path) for path in paths]
    runs = engine_of(engine) if engine else plan_engine(plans[0])
    names = [path.stem for path in paths]
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    contenders = [
        Contender(name=name, cost=cost_plan(plan, runs), engines=runs.name)
        for name, plan in zip(names, plans, strict=True)
    ]
    missing: dict[str, Infeasible] = {}
    if baselines:
        found, missing = all_baselines(plans[0], runs)
        contenders += found
    rows = compare(contenders, runs)
    if as_json:
        print(
            json.dumps({"plans": [asdict(row) for row in rows], "missing": {k: v.reason for k, v in missing.items()}})
        )
    else:
        print(render_rows(rows, missing))
    if any((p.workload, p.cluster) != (plans[0].workload, plans[0].cluster) for p in plans[1:]):
        print("the plans are for different workloads or clusters: ratios compare unlike things", file=sys.stderr)
    if html:
        _write(html, compare_page(contenders, runs, "Plans compared"))
    return 0


def diff_command(before: Path, after: Path, *, as_json: bool) -> int:
    """What changed between two plans."""
    plans = [legal_plan(path) for path in (before, after)]
    costs = [cost_plan(plan, plan_engine(plans[0])) for plan in plans]
    found = changes(*plans)
    if as_json:
        rows = {"changes": [asdict(c) for c in found], "effects": [asdict(e) for e in effects(*costs)]}
        print(json.dumps({**rows, "iteration_s": [cost.iteration_s for cost in costs]}))
    else:
        print(render_diff(found, *costs))
    return 0


def headline_command(*, engine: str, seconds: float, seed: int, html: Path | None, as_json: bool) -> int:
    """The published case: our hours beside those measured by others."""
    check_effort(seconds, seed)
    runs = engine_of(engine) if engine else published.ENGINE
    rows, contenders = published.headline_rows(_searched(runs, seconds, seed), runs)
    if as_json:
        print(json.dumps({"steps": published.STEPS, "engine": runs.name, "rows": [asdict(row) for row in rows]}))
    else:
        print(published.render_headline(rows, runs))
    if html:
        _write(html, compare_page(contenders, runs, "PPO with four 70B models on 128 A100-80GB"))
    return 0


def _searched(engine: Engine, seconds: float, seed: int) -> Contender | Infeasible:
    request = published.headline_request()
    space = build_space(request.workload, request.cluster, engine, Limits())
    if isinstance(space, Infeasible):
        return space
    with SearchProgress() as progress:
        found = search(space.problem, seconds=seconds, seed=seed, workers=os.cpu_count() or 1, progress=progress.update)
    if isinstance(found, Infeasible):
        return found
    plan = replace(space.plan(tidy(space.problem, found.decision)), notes=published.SEARCHED)
    return Contender(name=published.SEARCHED, cost=cost_plan(plan, engine), engines=engine.name)


def _write(path: Path, text: str) -> None:
    write_atomically(path, text)
    print(f"wrote {path}", file=sys.stderr)
