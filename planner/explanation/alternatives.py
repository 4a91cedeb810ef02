"""What each call of a plan would cost elsewhere, with everything else as it is, and why it is not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from cost_models.estimate import PlanCost, cost_plan
from planner.explanation.critical import critical_path
from planner.explanation.neighbourhood import Neighbour, moved, neighbours
from planner.space.layouts import Placement
from planner.space.pricing import Space
from plans.checks import check_plan
from plans.plan import PlannedCall
from plans.program import StepKind
from plans.strategy import ParallelStrategy

CONFIRMED = 4  # neighbours that are costed in full until one fits
LEAST_CHANGE = 1e-4  # shorter differences of a period are none


class Where(StrEnum):
    """What an alternative changes: settings such as micro-batches, the degrees on the same mesh, or the mesh's size."""

    SETTINGS = "settings"
    STRATEGY = "strategy"
    MESH = "mesh"


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """The best other layout of one kind, all else fixed. change_s: of the period. own_ratio: the call's own seconds
    against the present ones. moved_s: change of the seconds of reallocations. blocks: calls on the critical path that
    now wait for these GPUs."""

    where: Where
    mesh: str
    strategy: str
    iteration_s: float
    change_s: float
    own_ratio: float
    moved_s: float
    blocks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TooLarge:
    """A layout that would shorten the period and does not fit."""

    mesh: str
    strategy: str
    over_gib: float
    change_s: float
    own_ratio: float


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """What one call would cost elsewhere; `too_large` would be better than all that fits, None where memory is no
    bound and where the plan lacks memory as it is."""

    call: str
    seconds: float
    best: tuple[Alternative, ...]
    too_large: TooLarge | None


def elsewhere(cost: PlanCost, call: str, space: Space | None) -> Elsewhere:
    """The best alternatives of a call. Without a space the call stays on its mesh."""
    now = cost.program.plan.planned(call)
    groups: dict[Where, list[Neighbour]] = {where: [] for where in Where}
    for neighbour in neighbours(cost, call, space):
        where = _where(now, neighbour.mesh_and_strategy)
        if where:
            groups[where].append(neighbour)
    found = [_best(cost, call, where, members) for where, members in groups.items()]
    best = tuple(alternative for alternative in found if alternative)
    least_s = min([cost.iteration_s, *(alternative.iteration_s for alternative in best)])
    return Elsewhere(
        call=call,
        seconds=cost.durations.seconds[call],
        best=best,
        too_large=_too_large(cost, call, [n for members in groups.values() for n in members], least_s),
    )


def _where(now: PlannedCall, entry: Placement) -> Where | None:
    """How another layout differs; None for a mesh of the same size in another place."""
    mesh, strategy = entry
    if mesh != now.mesh:
        return Where.MESH if mesh.size != now.mesh.size else None
    return Where.SETTINGS if strategy.degrees == now.strategy.degrees else Where.STRATEGY


def _best(cost: PlanCost, call: str, where: Where, found: Sequence[Neighbour]) -> Alternative | None:
    """The best neighbour that fits, with its full cost."""
    ranked = sorted((n for n in found if n.over_bytes <= 0), key=lambda n: (n.period_s, n.own_s))
    for neighbour in ranked[:CONFIRMED]:
        plan = moved(cost.program.plan, call, neighbour.mesh_and_strategy)
        if check_plan(plan):
            continue
        other = cost_plan(plan, cost.engine)
        if other.fits:
            return _alternative(cost, other, call, where, neighbour.mesh_and_strategy)
    return None


def _alternative(cost: PlanCost, other: PlanCost, call: str, where: Where, entry: Placement) -> Alternative:
    mesh, strategy = entry
    return Alternative(
        where=where,
        mesh=mesh.text(cost.program.plan.cluster),
        strategy=_words(strategy, cost.program.plan.planned(call).strategy),
        iteration_s=other.iteration_s,
        change_s=_change(other.iteration_s, cost.iteration_s),
        own_ratio=other.durations.seconds[call] / cost.durations.seconds[call],
        moved_s=_reallocations_s(other) - _reallocations_s(cost),
        blocks=_blocked(cost, other, call),
    )


def _too_large(cost: PlanCost, call: str, found: Sequence[Neighbour], least_s: float) -> TooLarge | None:
    """Of what would shorten the period below `least_s` at least half as much as the best, if it fitted, what lacks the
    least."""
    if not cost.fits:
        return None
    plan = cost.program.plan
    heavy = [n for n in found if n.over_bytes > 0 and n.period_s < least_s * (1 - LEAST_CHANGE)]
    if not heavy:
        return None
    enough = (min(n.period_s for n in heavy) + least_s) / 2
    wanted = min((n for n in heavy if n.period_s <= enough), key=lambda n: (n.over_bytes, n.period_s))
    mesh, strategy = wanted.mesh_and_strategy
    other = cost_plan(moved(plan, call, wanted.mesh_and_strategy), cost.engine)
    if other.fits:
        return None
    return TooLarge(
        mesh=mesh.text(plan.cluster),
        strategy=_words(strategy, plan.planned(call).strategy),
        over_gib=other.memory.peak_gib - plan.cluster.gpu.memory_gib,
        change_s=_change(other.iteration_s, cost.iteration_s),
        own_ratio=other.durations.seconds[call] / cost.durations.seconds[call],
    )


def _change(then_s: float, now_s: float) -> float:
    return then_s - now_s if abs(then_s - now_s) > LEAST_CHANGE * now_s else 0.0


def _reallocations_s(cost: PlanCost) -> float:
    return sum(cost.durations.of(s) for s in cost.program.steps if s.kind is StepKind.REALLOCATE)


def _blocked(before: PlanCost, after: PlanCost, call: str) -> tuple[str, ...]:
    """Calls of the new critical path whose GPUs the call now takes and did not take before."""
    path = critical_path(after.program, after.durations).calls
    if call not in path:
        return ()
    old, new = before.program.plan.planned(call).mesh, after.program.plan.planned(call).mesh
    others = (p for p in after.program.plan.calls if p.call != call and p.call in path)
    return tuple(p.call for p in others if p.mesh.overlaps(new) and not p.mesh.overlaps(old))


def _words(strategy: ParallelStrategy, now: ParallelStrategy) -> str:
    """Degrees, and the settings that differ from the present ones."""
    words = [strategy.degrees]
    for key in ("micro_batches", "groups"):
        if getattr(strategy, key) != getattr(now, key):
            words.append(f"{key} {getattr(strategy, key)}")
    if strategy.recompute != now.recompute:
        words.append(f"recompute {strategy.recompute.value}")
    if strategy.offload != now.offload:
        words.append("offloaded" if strategy.offload else "not offloaded")
    return ", ".join(words)
