"""One call of a plan free, all others as they are: a search problem whose options are that call's other layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.candidates import Candidates
from cost_models.estimate import PlanCost
from cost_models.memory.memory import call_memory
from planner.search import schedule
from planner.search.problem import Decision, SearchProblem
from planner.space.layouts import Placement, Pruned, Shape
from planner.space.limits import Limits
from planner.space.numbering import options_of, problem_of
from planner.space.pricing import Space, price_call, usable_bytes
from plans.plan import ExecutionPlan


@dataclass(frozen=True, eq=False)
class Neighbour:
    """Another layout of one call, with what the plan would cost then by the search's own reckoning. own_s: seconds of
    the call itself. over_bytes: what GPUs would lack."""

    mesh_and_strategy: Placement
    own_s: float
    period_s: float
    over_bytes: float


def neighbours(cost: PlanCost, call: str, space: Space | None) -> list[Neighbour]:
    """Every layout of a call on its own mesh, and those of the space on other meshes, with all else as it is."""
    plan, now = cost.program.plan, cost.program.plan.planned(call)
    shape = Shape(now.mesh.gpus, now.mesh.nodes)
    priced = price_call(plan.workload, call, plan.cluster, cost.engine, Pruned(), [shape])
    entries: list[Placement] = [(now.mesh, strategy) for strategy in priced.strategies]
    columns = [np.stack([priced.time_s, priced.resident, priced.transient, priced.copy], axis=1)]
    if space:
        at = space.problem.names.index(call)
        other, options = space.options[call], space.problem.options[at]
        keep = np.array([mesh != now.mesh for mesh, _ in other])
        prices = (options.time_s, options.resident_bytes, options.transient_bytes, options.shared_bytes)
        columns.append(np.stack(prices, axis=1)[keep])
        entries += [entry for entry, kept in zip(other, keep, strict=True) if kept]
    new = [i for i, entry in enumerate(entries) if entry != (now.mesh, now.strategy)]
    price = np.concatenate(columns)[new]
    entries = [entries[i] for i in new]
    if not entries:
        return []
    tables = schedule.tables(_problem(cost, call, entries, price))
    found = []
    for i, entry in enumerate(entries):
        then = schedule.evaluate(tables, _decision(plan, call, i))
        found.append(Neighbour(entry, float(price[i, 0]), then.period_s, then.overflow_bytes))
    return found


def moved(plan: ExecutionPlan, call: str, entry: Placement) -> ExecutionPlan:
    """The plan with another layout for one call."""
    mesh, strategy = entry
    calls = tuple(replace(p, mesh=mesh, strategy=strategy) if p.call == call else p for p in plan.calls)
    return replace(plan, calls=calls, estimate=None)


def _names(plan: ExecutionPlan) -> tuple[str, ...]:
    return tuple(call.name for call in plan.workload.graph.model_calls)


def _decision(plan: ExecutionPlan, call: str, option: int) -> Decision:
    names = _names(plan)
    return Decision(
        choice=tuple(option if name == call else 0 for name in names),
        order=tuple(names.index(planned.call) for planned in plan.calls),
        lag=tuple(plan.planned(name).lag for name in names),
    )


def _problem(cost: PlanCost, call: str, entries: Sequence[Placement], price: NDArray[np.float64]) -> SearchProblem:
    """price: [entries, 4] seconds, resident, transient and shared bytes of the free call."""
    plan = cost.program.plan
    names, machine = _names(plan), cost.engine.on(plan.cluster, plan.workload.dtype)
    layouts: dict[str, Sequence[Placement]] = {n: [(plan.planned(n).mesh, plan.planned(n).strategy)] for n in names}
    prices = {name: _present_price(cost, name) for name in names if name != call}
    layouts[call], prices[call] = entries, price
    return problem_of(
        plan.workload,
        machine,
        usable_bytes(machine, Limits()),
        layouts,
        {name: options_of(layouts[name], plan.cluster, prices[name]) for name in names},
    )


def _present_price(cost: PlanCost, call: str) -> NDArray[np.float64]:
    """[1, 4] of the call as planned; the functions that it hosts add their time."""
    plan, now = cost.program.plan, cost.program.plan.planned(call)
    candidates = Candidates.of([(now.mesh, now.strategy)])
    kind = plan.workload.graph.call(call).kind
    machine = cost.engine.running(kind).on(plan.cluster, plan.workload.dtype)
    memory = call_memory(machine, plan.workload, call, candidates)
    graph = plan.workload.graph
    hosted = [f.name for f in graph.calls if not f.model and graph.host(f.name) == call]
    seconds = sum(cost.durations.seconds.get(name, 0.0) for name in (call, *hosted))
    row = (np.array([seconds]), memory.resident_bytes, memory.transient_bytes, memory.copy_bytes)
    return np.stack(row, axis=1)
