"""What the planning commands do, once their options are parsed. Data goes to stdout, words to stderr.

Every command returns its exit code: 0 done, 1 infeasible or a failed check.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from os.path import relpath
from pathlib import Path
from typing import Any

from cost_models.engines.engine import Engine
from cost_models.estimate import PlanCost, cost_plan
from cost_models.provenance.sources import plan_sources
from cost_models.validation.error_band import error_band
from planner.baselines import symmetric
from planner.commands_memory import memory_problems, misfits
from planner.explanation.binding import binding_terms
from planner.explanation.critical import critical_path
from planner.limits import Limits
from planner.loading import legal_plan
from planner.nearest import with_nearest
from planner.pricing import Space, build_space
from planner.progress import SearchProgress
from planner.report import WIDTH, render_cost
from planner.request import Request, check_effort
from planner.search.portfolio import Answer, Method, search
from planner.tidy import tidy
from planner.whatif import what_if
from plans.checks import check_plan
from plans.codec import is_stale, plan_text, read_plan, save_plan
from plans.documents import locate
from plans.errors import Infeasible
from plans.plan import ExecutionPlan
from plans.render import render_plan
from plans.runnable import run_note, run_problems


def search_command(
    request: Request,
    *,
    engine: Engine,
    method: str,
    seconds: float,
    seed: int,
    limits: Limits,
    output: Path,
    as_json: bool,
    verbose: bool,
) -> int:
    """Search, write the plan, and say what was found."""
    check_effort(seconds, seed)
    began = time.perf_counter()
    space = build_space(request.workload, request.cluster, engine, limits)
    if isinstance(space, Infeasible):
        return _infeasible(with_nearest(space, request.workload, request.cluster, engine, limits), as_json)
    if verbose:
        _print_space(space)
    with SearchProgress() as progress:
        found = search(
            space.problem,
            method=Method(method),
            seconds=seconds,
            seed=seed,
            workers=os.cpu_count() or 1,
            progress=progress.update,
        )
    if isinstance(found, Infeasible):
        return _infeasible(with_nearest(found, request.workload, request.cluster, engine, limits), as_json)
    if verbose:
        _print_counts(found.dropped)
    cost = cost_plan(space.plan(tidy(space.problem, found.decision)), engine)
    plan = _finished(cost, request, output, found, method, engine, seed, time.perf_counter() - began)
    save_plan(plan, output)
    if as_json:
        print(json.dumps(_summary(plan, cost, found, output, time.perf_counter() - began)))
    else:
        print(render_plan(plan, cost.timeline))
        _print_verdict(request, plan, cost, engine, output)
    return 0


def _finished(
    cost: PlanCost,
    request: Request,
    output: Path,
    found: Answer,
    method: str,
    engine: Engine,
    seed: int,
    seconds: float,
) -> ExecutionPlan:
    """The plan with its estimate, provenance and run file."""
    bound = found.bound_s
    search_record: dict[str, Any] = {
        "method": method,
        "lower_bound_s": bound,
        "gap": _gap(cost.iteration_s, bound),
        "seconds": round(seconds, 2),
        "evaluated": found.evaluated,
        "seed": seed,
        "engine": engine.name,
    }
    run = relpath(request.run.resolve(), output.resolve().parent) if request.run else ""
    plan = replace(cost.program.plan, run=run, provenance={"search": search_record, "costs": plan_sources(cost).shares})
    return plan.with_estimate(cost.estimate)


def _gap(value: float, bound: float | None) -> float | None:
    return None if bound is None else max(0.0, round(1.0 - bound / value, 6))


def _summary(plan: ExecutionPlan, cost: PlanCost, found: Answer, output: Path, seconds: float) -> dict[str, Any]:
    return {
        "iteration_s": cost.iteration_s,
        "latency_s": cost.latency_s,
        "lower_bound_s": found.bound_s,
        "gap": _gap(cost.iteration_s, found.bound_s),
        "search_s": round(seconds, 3),
        "method": plan.provenance["search"]["method"],
        "evaluated": found.evaluated,
        "peak_gib": round(cost.memory.peak_gib, 3),
        "plan": str(output),
    }


def _print_verdict(request: Request, plan: ExecutionPlan, cost: PlanCost, engine: Engine, output: Path) -> None:
    record = plan.provenance["search"]
    words = f"{cost.iteration_s:.4g} s per iteration"
    if record["gap"] is not None:
        words += f", at most {record['gap']:.2%} from the optimum (lower bound {record['lower_bound_s']:.4g} s)"
    best = symmetric(request.workload, request.cluster, engine)
    if isinstance(best, ExecutionPlan):
        uniform = cost_plan(best, engine).iteration_s
        words += f"; the best symmetric plan takes {uniform:.4g} s ({uniform / cost.iteration_s:.2f}x)"
    _say(words)
    if note := run_note(plan):
        _say(note)
    print(f"wrote {output}; look at it with `realplan show {output}`", file=sys.stderr)


def _say(words: str) -> None:
    print("\n".join(textwrap.wrap(words, WIDTH, break_long_words=False, break_on_hyphens=False)), file=sys.stderr)


def _print_space(space: Space) -> None:
    for name, options in space.options.items():
        print(f"{name}: {len(options)} candidates", file=sys.stderr)
    _print_counts(space.pruned)


def _print_counts(dropped: Mapping[str, int]) -> None:
    for reason, count in sorted(dropped.items(), key=lambda item: -item[1]):
        print(f"  left out {count:>9,}: {reason}", file=sys.stderr)


def _infeasible(reason: Infeasible, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"infeasible": reason.reason, "hint": reason.hint}))
    else:
        print(f"infeasible: {reason.reason}\nhint: {reason.hint}", file=sys.stderr)
    return 1


def check_command(path: Path, *, write: bool, engine: Engine, as_json: bool) -> int:
    """Every problem of a plan, or its new estimate."""
    text = plan_text(path)
    plan, problems = read_plan(text)
    cost = None
    if plan is not None:
        problems = locate(text, check_plan(plan))
        if not problems:
            cost = cost_plan(plan, engine)
            problems = locate(text, memory_problems(cost))
    if as_json:
        rows = [{k: v for k, v in asdict(p).items() if k != "path"} for p in problems]
        refused = [p.message for p in run_problems(plan)] if plan is not None and not problems else []
        print(json.dumps({"ok": not problems, "problems": rows, "runtime_refuses": refused}))
    for problem in problems if not as_json else ():
        print(problem.text(str(path)), file=sys.stderr)
    if problems or plan is None or cost is None:
        return 1
    return _checked(path, plan, cost, write, as_json)


def _checked(path: Path, plan: ExecutionPlan, cost: PlanCost, write: bool, as_json: bool) -> int:
    stale = plan.estimate is None or is_stale(plan)
    if write:
        save_plan(plan.with_estimate(cost.estimate), path)
    if not as_json:
        memory = f"peak {cost.memory.peak_gib:.1f} of {plan.cluster.gpu.memory_gib:g} GiB in {cost.memory.peak_step}"
        print(f"ok: {cost.iteration_s:.4g} s per iteration, {memory}")
        if note := run_note(plan):
            _say(note)
        if stale and not write:
            print(f"the estimate in the file is out of date: `realplan check --write {path}`", file=sys.stderr)
    return 0


def estimate_command(path: Path, *, engine: Engine, changes: list[str], as_json: bool) -> int:
    """Predicted time by term and memory by moment, as the plan stands or under what-if changes."""
    plan = legal_plan(path)
    before = cost_plan(plan, engine)
    cost = cost_plan(what_if(plan, changes), engine) if changes else before
    if changes:
        ratio = cost.iteration_s / before.iteration_s
        _say(f"with {', '.join(changes)}: {ratio:,.2f}x the time of the plan as it stands")
    sources, band = plan_sources(cost), error_band(cost)
    binding = binding_terms(cost, critical_path(cost.program, cost.durations))
    if as_json:
        found: dict[str, Any] = {"terms": cost.terms, "peak_terms_bytes": cost.memory.peak_terms}
        found |= {"costs": sources.shares, "beyond_measured": sources.beyond, "band": asdict(band)}
        found |= {"binding": [asdict(term) for term in binding[:10]]}
        print(json.dumps({**asdict(cost.estimate), "fits": cost.fits, **found}))
    else:
        print(render_cost(cost, sources, band, binding, misfits(cost)))
    return 0
