"""`realplan search`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from os.path import relpath
from pathlib import Path
from typing import Any

from cost_models.engines.engine import Engine
from cost_models.estimate import PlanCost
from cost_models.provenance.sources import plan_sources
from planner.baselines import symmetric
from planner.best import Effort, Found, best_in
from planner.cli.output import say
from planner.cli.progress import SearchProgress
from planner.measured import Ran
from planner.remedies.nearest import with_nearest
from planner.request import Request, check_effort
from planner.space.limits import Limits
from planner.space.pricing import Space, build_space
from plans.codec import save_plan
from plans.errors import Infeasible
from plans.files import check_target
from plans.plan import ExecutionPlan
from plans.render import render_plan
from plans.runnable import run_note


def search_command(
    request: Request,
    *,
    engine: Engine,
    limits: Limits,
    effort: Effort,
    output: Path,
    as_json: bool,
    verbose: bool,
    ran: Ran | None = None,
) -> int:
    """Search, write the plan, and say what was found. ran: the run whose measurements are the engine; its plan is where
    the search begins, and what the new one is held against."""
    check_effort(effort.seconds, effort.seed)
    check_target(output)
    began = time.perf_counter()
    space = build_space(request.workload, request.cluster, engine, limits, whole=False)
    if isinstance(space, Infeasible):
        return _infeasible(with_nearest(space, request.workload, request.cluster, engine, limits), as_json)
    if verbose:
        _print_space(space)
    with SearchProgress() as progress:
        start = space.decision_of(ran.plan) if ran and ran.plan.cluster == request.cluster else None
        found = best_in(space, effort, progress.update, start=start)
    if isinstance(found, Infeasible):
        return _infeasible(with_nearest(found, request.workload, request.cluster, engine, limits), as_json)
    if verbose:
        _print_counts(found.dropped)
    cost, plan = found.cost, _finished(found, request, output, effort, limits, time.perf_counter() - began)
    save_plan(plan, output)
    if as_json:
        beside = {} if ran is None else {"ran_s": ran.priced_s, "measured_s": ran.run.iteration_s}
        print(json.dumps(_summary(plan, found, output, time.perf_counter() - began) | beside))
    else:
        print(render_plan(plan, cost.timeline))
        _print_verdict(request, plan, cost, limits, output)
        if ran is not None:
            say(_beside_run(ran, plan, cost))
    return 0


def _finished(
    found: Found, request: Request, output: Path, effort: Effort, limits: Limits, seconds: float
) -> ExecutionPlan:
    """The plan with its estimate, provenance and run file."""
    record: dict[str, Any] = {
        "method": effort.method.value,
        "lower_bound_s": found.bound_s,
        "gap": _rounded(found.gap),
        "seconds": round(seconds, 2),
        "evaluated": found.evaluated,
        "seed": effort.seed,
        "engine": found.space.engine.name,
    }
    if limits.words:
        record["limits"] = limits.words
    run = relpath(request.run.resolve(), output.resolve().parent) if request.run else ""
    return replace(found.plan, run=run, provenance={"search": record, "costs": plan_sources(found.cost).shares})


def _rounded(gap: float | None) -> float | None:
    return None if gap is None else round(gap, 6)


def _summary(plan: ExecutionPlan, found: Found, output: Path, seconds: float) -> dict[str, Any]:
    cost = found.cost
    return {
        "iteration_s": cost.iteration_s,
        "latency_s": cost.latency_s,
        "lower_bound_s": found.bound_s,
        "gap": _rounded(found.gap),
        "search_s": round(seconds, 3),
        "method": plan.provenance["search"]["method"],
        "evaluated": found.evaluated,
        "peak_gib": round(cost.memory.peak_gib, 3),
        "plan": str(output),
    }


def _print_verdict(request: Request, plan: ExecutionPlan, cost: PlanCost, limits: Limits, output: Path) -> None:
    record = plan.provenance["search"]
    words = f"{cost.iteration_s:.4g} s per iteration"
    if record["gap"] is not None:
        words += f", at most {record['gap']:.2%} from the optimum (lower bound {record['lower_bound_s']:.4g} s)"
    say(words + _beside_symmetric(request, cost, limits))
    if note := run_note(plan):
        say(note)
    print(f"wrote {output}; look at it with `realplan show {output}`", file=sys.stderr)


def _beside_symmetric(request: Request, cost: PlanCost, limits: Limits) -> str:
    """The best plan with one layout for all calls, within the user's limits where there is one."""
    within = symmetric(request.workload, request.cluster, cost.engine, limits)
    best = within
    if isinstance(within, Infeasible) and limits != Limits():
        best = symmetric(request.workload, request.cluster, cost.engine)
    if isinstance(best, Infeasible):
        return ""
    words = f"; the best symmetric plan takes {best.iteration_s:.4g} s ({best.iteration_s / cost.iteration_s:.2f}x)"
    if best is within:
        return f"{words}, within {', '.join(limits.words)}" if limits.words else words
    return f"{words}, but ignores {', '.join(limits.words)}"


def _beside_run(ran: Ran, plan: ExecutionPlan, cost: PlanCost) -> str:
    """What the new plan would gain against the one that ran, both by the measured costs."""
    if not ran.run.seconds:
        return f"{ran.run.folder} has measured no iteration: costs are those of {ran.engine.inner.name}"
    factors = ", ".join(f"{name} {factor:.2g} x" for name, factor in ran.engine.factors)
    priced = ran.priced_s
    words = (
        f"measured against {ran.engine.inner.name}: {factors}\n"
        f"the plan of {ran.run.folder} takes {priced:.4g} s by these costs (it measured {ran.run.iteration_s:.4g} s)"
    )
    if plan.cluster == ran.plan.cluster and plan.calls == ran.plan.calls:
        return f"{words}: it is the best one that was found"
    return f"{words}; the new one {cost.iteration_s:.4g} s, {priced / cost.iteration_s:.2f}x"


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
