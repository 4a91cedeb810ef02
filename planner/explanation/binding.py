"""What binds: the terms of the calls on the critical path, grouped by the resource that more of would make faster."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import StrEnum

from cost_models.estimate import PlanCost
from planner.explanation.critical import CriticalPath, Link
from plans.program import StepKind


class Resource(StrEnum):
    """What a time term waits for."""

    COMPUTE = "compute"
    MEMORY_BANDWIDTH = "memory bandwidth"
    NETWORK = "network"
    BUBBLE = "pipeline bubble"
    HOST = "host launch"
    IMBALANCE = "imbalance"
    HOST_LINK = "host memory link"
    FUNCTION = "Python function"


_RESOURCES = {
    Resource.COMPUTE: ("linears", "attention", "recompute", "prefill", "decode_head", "head_and_loss"),
    Resource.MEMORY_BANDWIDTH: ("streaming", "optimizer", "decode_linears", "decode_attention"),
    Resource.NETWORK: (
        "tensor_parallel",
        "context_parallel",
        "expert_parallel",
        "weight_gather",
        "gradient_reduce",
        "parameter_gather",
        "pipeline_p2p",
        "decode_tensor_parallel",
        "decode_p2p",
    ),
    Resource.BUBBLE: ("bubble",),
    Resource.HOST: ("gaps", "host", "overhead", "call", "decode_kernels", "decode_host"),
    Resource.HOST_LINK: ("offload",),
}
_RESOURCE_OF = {term: resource for resource, terms in _RESOURCES.items() for term in terms}


@dataclass(frozen=True, slots=True)
class BindingTerm:
    """Seconds per iteration of one term of one step on the critical path."""

    step: str
    term: str
    resource: Resource
    seconds: float


def resource_of(term: str, pp: int) -> Resource:
    """The resource of a call's term. With a pipeline the vocabulary head counts where it makes the last stage longer
    than the others."""
    if term == "head_and_loss" and pp > 1:
        return Resource.IMBALANCE
    return _RESOURCE_OF.get(term, Resource.COMPUTE)


def binding_terms(cost: PlanCost, path: CriticalPath) -> tuple[BindingTerm, ...]:
    """Terms of the critical path, largest first; they add up to the period."""
    found: list[BindingTerm] = []
    for link in path.links:
        parts = _parts(cost, link)
        found += [BindingTerm(link.step, term, kind, s / path.periods) for term, kind, s in parts if s > 0]
    return tuple(sorted(found, key=lambda term: -term.seconds))


def _parts(cost: PlanCost, link: Link) -> list[tuple[str, Resource, float]]:
    if link.kind == StepKind.CALL:
        pp = cost.program.plan.planned(link.call).strategy.pp
        return [(term, resource_of(term, pp), seconds) for term, seconds in cost.terms[link.call].items()]
    if link.kind == StepKind.FUNCTION:
        return [("function", Resource.FUNCTION, link.seconds)]
    return [(link.kind, Resource.NETWORK, link.seconds)]


def by_resource(terms: tuple[BindingTerm, ...]) -> dict[str, float]:
    """Seconds per iteration by resource, largest first."""
    sums: dict[str, float] = defaultdict(float)
    for term in terms:
        sums[term.resource.value] += term.seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
