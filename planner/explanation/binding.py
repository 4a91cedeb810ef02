"""What binds: the terms of the calls on the critical path, grouped by the resource that more of would make faster."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from cost_models.estimate import PlanCost
from cost_models.terms import Resource, term
from planner.explanation.critical import CriticalPath, Link
from plans.program import StepKind


@dataclass(frozen=True, slots=True)
class BindingTerm:
    """Seconds per iteration of one term of one step on the critical path."""

    step: str
    term: str
    resource: Resource
    seconds: float


def resource_of(name: str, pp: int) -> Resource:
    """The resource of a call's term."""
    record = term(name)
    return record.pipelined if record.pipelined and pp > 1 else record.resource


def binding_terms(cost: PlanCost, path: CriticalPath) -> tuple[BindingTerm, ...]:
    """Terms of the critical path, largest first; they add up to the period."""
    found: list[BindingTerm] = []
    for link in path.links:
        parts = _parts(cost, link)
        found += [BindingTerm(link.step, name, kind, s / path.periods) for name, kind, s in parts if s > 0]
    return tuple(sorted(found, key=lambda part: -part.seconds))


def _parts(cost: PlanCost, link: Link) -> list[tuple[str, Resource, float]]:
    if link.kind == StepKind.CALL:
        pp = cost.program.plan.planned(link.call).strategy.pp
        return [(name, resource_of(name, pp), seconds) for name, seconds in cost.terms[link.call].items()]
    if link.kind == StepKind.FUNCTION:
        return [("function", Resource.FUNCTION, link.seconds)]
    return [(link.kind, Resource.NETWORK, link.seconds)]


def by_resource(terms: tuple[BindingTerm, ...]) -> dict[str, float]:
    """Seconds per iteration by resource, largest first."""
    sums: dict[str, float] = defaultdict(float)
    for part in terms:
        sums[part.resource.value] += part.seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
