"""One call of a plan free, all others as they are: a search problem whose options are that call's other layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.candidates import Candidates
from cost_models.estimate import PlanCost
from cost_models.memory.memory import call_memory
from cost_models.reallocation import reallocation_time
from planner.limits import Limits
from planner.pricing import Entry, Space, price_call, usable_bytes
from planner.search import schedule
from planner.search.problem import Decision, Dependency, Options, Problem
from planner.space import Pruned, Shape
from plans.layout import Layout
from plans.plan import ExecutionPlan


@dataclass(frozen=True, eq=False)
class Neighbour:
    """Another layout of one call, with what the plan would cost then by the search's own reckoning. own_s: seconds of
    the call itself. over_bytes: what GPUs would lack."""

    mesh_and_strategy: Entry
    own_s: float
    period_s: float
    over_bytes: float


def neighbours(cost: PlanCost, call: str, space: Space | None) -> list[Neighbour]:
    """Every layout of a call on its own mesh, and those of the space on other meshes, with all else as it is."""
    plan, now = cost.program.plan, cost.program.plan.planned(call)
    shape = Shape(now.mesh.gpus, now.mesh.nodes)
    priced = price_call(plan.workload, call, plan.cluster, cost.engine, Pruned(), [shape])
    entries: list[Entry] = [(now.mesh, strategy) for strategy in priced.strategies]
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


def moved(plan: ExecutionPlan, call: str, entry: Entry) -> ExecutionPlan:
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


def _problem(cost: PlanCost, call: str, entries: Sequence[Entry], price: NDArray[np.float64]) -> Problem:
    """price: [entries, 4] seconds, resident, transient and shared bytes of the free call."""
    plan = cost.program.plan
    names = _names(plan)
    layouts = {name: [(plan.planned(name).mesh, plan.planned(name).strategy)] for name in names}
    prices = {name: _present_price(cost, name) for name in names if name != call}
    layouts[call], prices[call] = list(entries), price
    number: dict[tuple[int, ...], int] = {}
    options = tuple(_options(plan, layouts[name], prices[name], number) for name in names)
    edges = plan.workload.graph.model_edges
    return Problem(
        gpus=plan.cluster.size,
        capacity_bytes=usable_bytes(cost.engine.on(plan.cluster, plan.workload.dtype), Limits()),
        names=names,
        options=options,
        edges=tuple(Dependency(names.index(e.source), names.index(e.target), e.distance) for e in edges),
        moves=_moves(cost, names, layouts),
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


def _options(
    plan: ExecutionPlan, entries: Sequence[Entry], price: NDArray[np.float64], number: dict[tuple[int, ...], int]
) -> Options:
    """number: slices -> layout id, shared by all calls."""
    slices = [(s.tp, s.pp, s.vpp, s.ep) for _, s in entries]
    return Options(
        first=np.array([mesh.ranks(plan.cluster).start for mesh, _ in entries]),
        width=np.array([mesh.size for mesh, _ in entries]),
        time_s=price[:, 0],
        resident_bytes=price[:, 1],
        transient_bytes=price[:, 2],
        layout=np.array([number.setdefault(key, len(number)) for key in slices]),
        copy_bytes=price[:, 3],
    )


def _moves(
    cost: PlanCost, names: tuple[str, ...], layouts: dict[str, list[Entry]]
) -> dict[tuple[int, int], NDArray[np.float64]]:
    """Reallocation seconds from the options of each trainer to those of its model's other calls."""
    plan = cost.program.plan
    machine = cost.engine.on(plan.cluster, plan.workload.dtype)
    moves = {}
    for role, trainer in plan.workload.graph.trainers.items():
        spec = plan.workload.models[role]
        for name in names:
            if name == trainer or plan.workload.graph.call(name).model != role:
                continue
            pair = [[Layout.of(spec, *entry, plan.cluster) for entry in layouts[c]] for c in (trainer, name)]
            pairs = [(source, target) for source in pair[0] for target in pair[1]]
            seconds = reallocation_time(machine, pairs)
            moves[names.index(trainer), names.index(name)] = seconds.reshape(len(pair[0]), len(pair[1]))
    return moves
