"""Why a plan takes as long as it does, and what else there is: everything that `realplan explain` tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cost_models.engines.engine import Engine
from cost_models.estimate import PlanCost, cost_plan
from cost_models.simulate import Durations, simulate
from planner.best import Effort, Found, best_in
from planner.explanation.alternatives import Elsewhere, TooLarge, elsewhere
from planner.explanation.binding import BindingTerm, binding_terms, by_resource
from planner.explanation.critical import CriticalPath, critical_path
from planner.explanation.kinds import KindOfPlan, best_kinds, kind_of
from planner.explanation.upgrades import Upgrade, upgrades
from planner.pictures.idle import idle_by_mesh, idle_share
from planner.search.portfolio import Method
from planner.space.limits import Limits
from planner.space.pricing import Space, build_space
from plans.cluster import DeviceMesh
from plans.graph import CallKind
from plans.plan import ExecutionPlan

KINDS = 5
EVALUATIONS_PER_SECOND = 200_000  # they and not the clock decide where the machine is fast enough
SPARE = 0.01  # of the period
SEARCH_SHARE, UPGRADE_SHARE, KINDS_SHARE = 0.1, 0.1, 0.6  # of the seconds: present cluster, each upgrade, all kinds


@dataclass(frozen=True, kw_only=True)
class Headroom:
    """Memory of the fullest GPU. wanted_by: the call whose layout would shorten the period most if it had the room,
    empty where memory keeps no call from a faster layout."""

    peak_gib: float
    capacity_gib: float
    at_step: str
    on_rank: int
    wanted_by: str
    wanted: TooLarge | None


@dataclass(frozen=True, kw_only=True)
class KindSummary:
    """One plan of another kind. ratio: its seconds against the explained plan's. same_kind: the plan is of it."""

    iteration_s: float
    ratio: float
    same_kind: bool
    description: str


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why this plan. idle shares are parts of 1. spare: calls that could take `SPARE` of a period longer
    at no cost. `best_found_s` is the best of the short searches on this cluster."""

    iteration_s: float
    latency_s: float
    fits: bool
    path: CriticalPath
    spare: tuple[str, ...]
    idle: float
    idle_by_mesh: dict[str, float]
    calls: tuple[Elsewhere, ...]
    binding: tuple[BindingTerm, ...]
    binding_by_resource: dict[str, float]
    memory: Headroom
    best_found_s: float
    upgrades: tuple[Upgrade, ...]
    kinds: tuple[KindSummary, ...]


def explain(
    plan: ExecutionPlan,
    engine: Engine,
    *,
    seconds: float,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[str], None] = lambda words: None,
) -> Explanation:
    """Explain a legal plan; the short searches take about `seconds` in all."""
    cost = cost_plan(plan, engine)
    path = critical_path(cost.program, cost.durations)
    evaluations = max(1, int(seconds * EVALUATIONS_PER_SECOND))
    effort = Effort(seconds=seconds, seed=seed, workers=workers, method=Method.WALK, evaluations=evaluations)
    calls, best, kinds = _on_this_cluster(cost, effort, progress)
    binding = binding_terms(cost, path)
    return Explanation(
        iteration_s=cost.iteration_s,
        latency_s=cost.latency_s,
        fits=cost.fits,
        path=path,
        spare=tuple(planned.call for planned in plan.calls if _spare(cost, planned.call)),
        idle=idle_share(cost.timeline, plan.cluster),
        idle_by_mesh=idle_by_mesh(cost.timeline, plan),
        calls=calls,
        binding=binding,
        binding_by_resource=by_resource(binding),
        memory=_headroom(cost, calls),
        best_found_s=best.iteration_s,
        upgrades=upgrades(best, plan, effort.part(UPGRADE_SHARE), progress),
        kinds=tuple(_summary(found, cost) for found in kinds),
    )


def _on_this_cluster(
    cost: PlanCost, effort: Effort, progress: Callable[[str], None]
) -> tuple[tuple[Elsewhere, ...], PlanCost, list[KindOfPlan]]:
    """What each call would cost elsewhere, the best plan known, and the best ones of several kinds.

    The priced space lives in here: on a thousand GPUs it is large, and the search for each upgrade makes its own."""
    plan = cost.program.plan
    progress("pricing layouts")
    priced = build_space(plan.workload, plan.cluster, cost.engine, Limits())
    space = priced if isinstance(priced, Space) else None
    calls = []
    for planned in plan.calls:
        progress(f"costing {planned.call} elsewhere")
        calls.append(elsewhere(cost, planned.call, space))
    return tuple(calls), *_searched(cost, space, effort, progress)


def _spare(cost: PlanCost, call: str) -> bool:
    """Whether a call that takes longer by a little leaves the period as it is."""
    seconds = dict(cost.durations.seconds)
    seconds[call] += SPARE * cost.iteration_s
    return simulate(cost.program, Durations(seconds)).period_s <= cost.iteration_s * (1 + 1e-9)


def _headroom(cost: PlanCost, calls: Sequence[Elsewhere]) -> Headroom:
    wanting = [call for call in calls if call.too_large]
    most = min(wanting, key=lambda call: call.too_large.change_s if call.too_large else 0.0, default=None)
    return Headroom(
        peak_gib=cost.memory.peak_gib,
        capacity_gib=cost.program.plan.cluster.gpu.memory_gib,
        at_step=cost.memory.peak_step,
        on_rank=cost.memory.peak_rank,
        wanted_by=most.call if most else "",
        wanted=most.too_large if most else None,
    )


def _searched(
    cost: PlanCost, space: Space | None, effort: Effort, progress: Callable[[str], None]
) -> tuple[PlanCost, list[KindOfPlan]]:
    """The best plan known of this cluster, and the best ones of several kinds; the explained plan is one of its kind
    where no search beats it."""
    own = KindOfPlan(kind_of(cost.program.plan), cost)
    if space is None:
        return cost, [own]
    progress("searching this cluster")
    searched = best_in(space, effort.part(SEARCH_SHARE), start=space.decision_of(cost.program.plan))
    found = searched if isinstance(searched, Found) and searched.cost.fits else None
    kinds = best_kinds(found, KINDS, effort.part(KINDS_SHARE), progress) if found else []
    best = {plan.kind: plan for plan in kinds}
    if cost.fits and (own.kind not in best or cost.iteration_s <= best[own.kind].cost.iteration_s):
        best[own.kind] = own
    known = [plan.cost for plan in best.values()] + ([found.cost] if found else [])
    ranked = sorted(best.values(), key=lambda plan: plan.cost.iteration_s)
    return min(known, key=lambda c: c.iteration_s, default=cost), ranked[:KINDS]


def _summary(found: KindOfPlan, cost: PlanCost) -> KindSummary:
    return KindSummary(
        iteration_s=found.cost.iteration_s,
        ratio=found.cost.iteration_s / cost.iteration_s,
        same_kind=found.kind == kind_of(cost.program.plan),
        description=describe(found.cost.program.plan),
    )


def describe(plan: ExecutionPlan) -> str:
    """Which calls run where, generation and training with their degrees, in one line."""
    meshes: dict[DeviceMesh, list[str]] = {}
    for call in plan.workload.graph.model_calls:
        planned = plan.planned(call.name)
        degrees = "" if call.kind is CallKind.INFERENCE else f" ({planned.strategy.degrees})"
        meshes.setdefault(planned.mesh, []).append(call.name + degrees)
    ordered = sorted(meshes, key=lambda mesh: (-mesh.size, mesh))
    return "; ".join(f"{mesh.text(plan.cluster)}: {', '.join(meshes[mesh])}" for mesh in ordered)
