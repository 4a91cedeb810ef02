"""Price the space: from workload and cluster to the `SearchProblem` that the solvers see, and back to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.candidates import Candidates
from cost_models.engines.engine import Engine
from cost_models.engines.machine import Machine
from cost_models.memory.memory import call_memory
from cost_models.time.calls import call_time
from planner.search.narrowing import Part, narrowed
from planner.search.problem import Decision, Options, SearchProblem
from planner.space.layouts import Layouts, Placement, Pruned, Shape, strategies
from planner.space.limits import Limits
from planner.space.numbering import free_problem, moving, options_of
from planner.space.pins import allowed, positions_for, shapes_for, why_none, with_pinned
from plans.cluster import GIB, ClusterSpec
from plans.errors import Infeasible
from plans.graph import Call
from plans.layout import held_slices
from plans.model import ModelSpec
from plans.plan import ExecutionPlan, PlannedCall
from plans.strategy import ParallelStrategy
from plans.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Space:
    """A priced search space. options: call -> (mesh, strategy) by option index of `problem`. known: a plan that is as
    good as every plan with an option that was left out for being slower; None where none was."""

    workload: Workload
    cluster: ClusterSpec
    engine: Engine
    options: Mapping[str, tuple[Placement, ...]]
    problem: SearchProblem
    pruned: Mapping[str, int]
    known: Decision | None = None

    def plan(self, decision: Decision) -> ExecutionPlan:
        """The plan of a decision, calls in the decision's order."""
        names = self.problem.names
        calls = []
        for index in decision.order:
            mesh, strategy = self.options[names[index]][decision.choice[index]]
            calls.append(PlannedCall(call=names[index], mesh=mesh, strategy=strategy, lag=decision.lag[index]))
        return ExecutionPlan(workload=self.workload, cluster=self.cluster, calls=tuple(calls))

    def decision_of(self, plan: ExecutionPlan) -> Decision | None:
        """The plan in the numbers of the space; a layout that the space has not is replaced by the fastest on its
        mesh, and there is no decision where the space has nothing on that mesh."""
        names = self.problem.names
        choice = []
        for name, options in zip(names, self.problem.options, strict=True):
            planned = plan.planned(name)
            entries = self.options[name]
            same = [i for i, entry in enumerate(entries) if entry == (planned.mesh, planned.strategy)]
            near = same or [i for i, (mesh, _) in enumerate(entries) if mesh == planned.mesh]
            if not near:
                return None
            choice.append(min(near, key=lambda i: float(options.time_s[i])))
        order = tuple(names.index(planned.call) for planned in plan.calls)
        return Decision(tuple(choice), order, tuple(plan.planned(name).lag for name in names))


@dataclass(frozen=True, kw_only=True)
class Priced:
    """Layouts of one call with their figures, arrays of equal length."""

    shapes: tuple[Shape, ...]
    strategies: tuple[ParallelStrategy, ...]
    time_s: NDArray[np.float64]
    resident: NDArray[np.float64]
    transient: NDArray[np.float64]
    copy: NDArray[np.float64]

    def take(self, keep: NDArray[np.intp]) -> Priced:
        """The layouts at the indices."""
        return Priced(
            shapes=tuple(self.shapes[i] for i in keep),
            strategies=tuple(self.strategies[i] for i in keep),
            time_s=self.time_s[keep],
            resident=self.resident[keep],
            transient=self.transient[keep],
            copy=self.copy[keep],
        )


def build_space(
    workload: Workload, cluster: ClusterSpec, engine: Engine, limits: Limits, *, whole: bool = True
) -> Space | Infeasible:
    """Enumerate, price, prune and place every call's layouts.

    whole: else a large space has only the options that a best plan can have, and is priced sooner.
    """
    machine = engine.on(cluster, workload.dtype)
    pruned = Pruned()
    capacity = usable_bytes(machine, limits)
    options: dict[str, tuple[Placement, ...]] = {}
    columns: dict[str, Options] = {}
    for call in workload.graph.model_calls:
        found = _call_options(workload, call, cluster, engine, limits, capacity, pruned)
        if isinstance(found, Infeasible):
            return found
        options[call.name], columns[call.name] = found
    free = free_problem(workload, cluster, capacity, options, columns, limits.same_mesh)

    def with_moves(part: Part) -> SearchProblem:
        return moving(free.restrict(part), workload, machine, _some(options, part))

    every = tuple(np.arange(len(entries)) for entries in options.values())
    left = None if whole else narrowed(free, with_moves)
    part = left.keep if left else every
    pruned.note("every plan with it takes longer than a known one", sum(map(len, every)) - sum(map(len, part)))
    return Space(
        workload=workload,
        cluster=cluster,
        engine=engine,
        options=_some(options, part),
        problem=with_moves(part),
        pruned=dict(pruned.counts),
        known=left.known if left else None,
    )


def _some(options: Mapping[str, tuple[Placement, ...]], part: Part) -> dict[str, tuple[Placement, ...]]:
    """The layouts of every call at some indices."""
    both = zip(options.items(), part, strict=True)
    return {name: tuple(entries[i] for i in kept.tolist()) for (name, entries), kept in both}


def _call_options(
    workload: Workload,
    call: Call,
    cluster: ClusterSpec,
    engine: Engine,
    limits: Limits,
    capacity: float,
    pruned: Pruned,
) -> tuple[tuple[Placement, ...], Options] | Infeasible:
    """Layouts of one call that fit and that no other of their shape beats, placed, with their figures."""
    found = layouts_of(workload, call.name, engine, pruned, shapes_for(call.name, cluster, limits))
    if not found:
        return Infeasible(f"no legal layout of `{call.name}` on {cluster.size} GPUs", "another number of GPUs")
    found = with_pinned(call.name, found, workload, cluster, limits)
    kept_rules = allowed(call.name, found, cluster, limits, pruned)
    if not kept_rules:
        return why_none(call.name, found, workload, cluster, limits)
    priced = price_layouts(workload, call.name, cluster, engine, kept_rules)
    fits = np.flatnonzero(priced.resident + priced.transient <= capacity)
    pruned.note("does not fit in memory even alone", len(priced.time_s) - len(fits))
    if not len(fits):
        return _too_large(call.name, priced, capacity, cluster, limits)
    priced = priced.take(fits)
    kept = _undominated(priced, workload.models[call.model], frozen=call.model not in workload.graph.trainers)
    pruned.note("another layout of the same shape is faster and smaller", len(priced.time_s) - len(kept))
    return _place(call.name, priced.take(kept), cluster, limits, pruned)


def usable_bytes(machine: Machine, limits: Limits) -> float:
    """Memory of a GPU that calls may use: its own or the user's bound, without the process's context."""
    capacity = float(machine.cluster.gpu_memory_bytes)
    if limits.max_memory_gib:
        capacity = min(capacity, limits.max_memory_gib * GIB)
    return capacity - machine.context_bytes


def price_call(
    workload: Workload,
    call: str,
    cluster: ClusterSpec,
    engine: Engine,
    pruned: Pruned,
    on: Sequence[Shape],
) -> Priced:
    """Time and memory of every layout of a call that the space tries on some shapes."""
    return price_layouts(workload, call, cluster, engine, layouts_of(workload, call, engine, pruned, on))


def layouts_of(workload: Workload, call: str, engine: Engine, pruned: Pruned, on: Sequence[Shape]) -> Layouts:
    """Every layout of a call that the space tries on some shapes."""
    cp = engine.running(workload.graph.call(call).kind).abilities.context_parallel
    return [(shape, s) for shape in on for s in strategies(workload, call, shape, pruned, context_parallel=cp)]


def price_layouts(workload: Workload, call: str, cluster: ClusterSpec, engine: Engine, found: Layouts) -> Priced:
    """Time and memory of layouts of a call. A function that the call hosts adds its time."""
    runs = engine.running(workload.graph.call(call).kind)
    mesh = {shape: shape.at(0) for shape in {shape for shape, _ in found}}
    candidates = Candidates.of([(mesh[shape], strategy) for shape, strategy in found])
    if not found:
        empty = np.zeros(0)
        return Priced(shapes=(), strategies=(), time_s=empty, resident=empty, transient=empty, copy=empty)
    machine = runs.on(cluster, workload.dtype)
    terms = call_time(machine, workload, call, candidates)
    memory = call_memory(machine, workload, call, candidates)
    hosted = sum(
        function.seconds_per_sample
        for function in workload.graph.calls
        if not function.model and workload.graph.host(function.name) == call
    )
    return Priced(
        shapes=tuple(shape for shape, _ in found),
        strategies=tuple(strategy for _, strategy in found),
        time_s=terms.total_s + hosted * workload.samples / candidates.dp,
        resident=memory.resident_bytes,
        transient=memory.transient_bytes,
        copy=memory.copy_bytes,
    )


def _undominated(priced: Priced, spec: ModelSpec, *, frozen: bool) -> NDArray[np.intp]:
    """Indices of layouts that no other of the same shape beats in time, resident and peak memory; of equal ones the
    first stays. A trained model's layouts compete only where they hold the same slices, because others are reallocated
    in another time: `planner.search.dominance` compares those."""
    number = dict[object, int]()
    slices = np.array([number.setdefault(held_slices(spec, s), len(number)) for s in priced.strategies])
    by_shape: dict[Shape, list[int]] = {}
    for i in np.lexsort((priced.transient, priced.resident, priced.time_s)).tolist():
        by_shape.setdefault(priced.shapes[i], []).append(i)
    kept = [_unbeaten(priced, np.array(members), slices, frozen) for members in by_shape.values()]
    return np.sort(np.concatenate(kept))


def _unbeaten(priced: Priced, members: NDArray[np.intp], slices: NDArray[np.intp], frozen: bool) -> NDArray[np.intp]:
    """Those of some layouts, ordered by time, that none before them beats."""
    time_s, resident, held = priced.time_s[members], priced.resident[members], slices[members]
    peak = resident + priced.transient[members]
    beats = (resident[:, None] <= resident) & (peak[:, None] <= peak) & (time_s[:, None] <= time_s)
    beats &= frozen | (held[:, None] == held)
    return members[~np.triu(beats, 1).any(axis=0)]


def _place(
    call: str, priced: Priced, cluster: ClusterSpec, limits: Limits, pruned: Pruned
) -> tuple[tuple[Placement, ...], Options]:
    """Every layout at every position of its shape that the user's rules allow: `allowed` has found one for each."""
    entries: list[Placement] = []
    source: list[int] = []
    for i, (shape, strategy) in enumerate(zip(priced.shapes, priced.strategies, strict=True)):
        for mesh in positions_for(call, shape, cluster, limits):
            broken = limits.refuses(call, mesh, strategy, cluster)
            if broken:
                pruned.note(broken)
                continue
            entries.append((mesh, strategy))
            source.append(i)
    at = np.array(source, dtype=np.intp)
    price = np.stack([priced.time_s, priced.resident, priced.transient, priced.copy], axis=1)
    column = options_of(entries, cluster, price[at])
    return tuple(entries), column


def _too_large(call: str, priced: Priced, capacity: float, cluster: ClusterSpec, limits: Limits) -> Infeasible:
    """Why a call has no layout that fits, and the smallest one there is."""
    need = priced.resident + priced.transient
    best = int(need.argmin())
    mesh = priced.shapes[best].at(0).text(cluster)
    rules = ", ".join(rule.text for rule in (*limits.pins, *limits.forbids) if rule.call in ("*", call))
    within = f" under {rules}" if rules else ""
    return Infeasible(
        f"`{call}` needs at least {need[best] / GIB:.1f} GiB per GPU{within}; {capacity / GIB:.1f} GiB are usable",
        f"more GPUs, or GPUs with more memory (smallest layout: {priced.strategies[best].degrees} on `{mesh}`)",
    )
