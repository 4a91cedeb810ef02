"""Plans that differ in kind: how wide generation and training are, and which calls share a mesh.

Widths are told apart by their share of the cluster, rounded to a power of two: 15 of 16 nodes are no other kind than
16. The best plan of each further kind is found as in Murty's ranking of assignments (1968, Operations Research 16):
a plan's kind is cut out of the space by forbidding its first width, or keeping the first and forbidding the second,
and so on; the best of all these parts is the next plan.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from cost_models.estimate import PlanCost
from planner.best import Effort, Found, best_in, everything
from planner.search.narrowing import Part
from planner.space.pricing import Space
from plans.cluster import ClusterSpec
from plans.graph import CallKind
from plans.plan import ExecutionPlan
from plans.workload import Workload


@dataclass(frozen=True, slots=True)
class Kind:
    """shares: halvings of the cluster by call, 0 for all of it. meshes: the calls on each mesh."""

    shares: tuple[tuple[str, int], ...]
    meshes: frozenset[frozenset[str]]


@dataclass(frozen=True, slots=True)
class KindOfPlan:
    """The best plan seen of a kind."""

    kind: Kind
    cost: PlanCost


@dataclass(frozen=True, slots=True)
class _Seen:
    """A part of the space and the best plan seen in it."""

    part: Part
    best: Found


def kind_of(plan: ExecutionPlan) -> Kind:
    """The kind of a plan."""
    shares = tuple((name, share(plan.planned(name).mesh.size, plan.cluster)) for name in telling_calls(plan.workload))
    meshes = {planned.mesh for planned in plan.calls}
    return Kind(shares, frozenset(frozenset(p.call for p in plan.calls if p.mesh == mesh) for mesh in meshes))


def telling_calls(workload: Workload) -> tuple[str, ...]:
    """The calls whose widths make the kind: generation and training."""
    calls = workload.graph.model_calls
    return tuple(call.name for call in calls if call.kind in (CallKind.GENERATE, CallKind.TRAIN_STEP))


def share(width: int, cluster: ClusterSpec) -> int:
    """Halvings of the cluster that come nearest to a width."""
    return round(math.log2(cluster.size / width))


def best_kinds(best: Found, count: int, effort: Effort, progress: Callable[[str], None]) -> list[KindOfPlan]:
    """The best plans seen of `count` kinds, fastest first. `best` is the best known plan of its space; `effort` is for
    all searches."""
    space = best.space
    searches = 1 + (count - 1) * len(telling_calls(space.workload))
    each = effort.part(1.0 / searches)
    frontier: list[tuple[float, int, _Seen]] = []
    number = 0
    if best.cost.fits:
        frontier.append((best.cost.iteration_s, number, _Seen(everything(space), best)))
    found: dict[Kind, KindOfPlan] = {}
    while frontier and len(found) < count:
        *_, seen = heapq.heappop(frontier)
        kind = kind_of(seen.best.plan)
        found.setdefault(kind, KindOfPlan(kind, seen.best.cost))
        if len(found) == count:
            break
        progress(f"searching for plans of another kind ({len(found)} found)")
        for part in _without(space, seen):
            other = best_in(space, each, start=seen.best.decision, among=part)
            if isinstance(other, Found) and other.cost.fits:
                number += 1
                heapq.heappush(frontier, (other.cost.iteration_s, number, _Seen(part, other)))
    return sorted(found.values(), key=lambda plan: plan.cost.iteration_s)


def _without(space: Space, seen: _Seen) -> Iterator[Part]:
    """Parts that together are the seen part without the widths of its best plan."""
    part = list(seen.part)
    for name in telling_calls(space.workload):
        at = space.problem.names.index(name)
        widths = space.problem.options[at].width
        shares = np.array([share(int(width), space.cluster) for width in widths[part[at]]])
        present = share(int(widths[seen.best.decision.choice[at]]), space.cluster)
        rest = part[at][shares != present]
        if len(rest):
            yield (*part[:at], rest, *part[at + 1 :])
        part[at] = part[at][shares == present]
