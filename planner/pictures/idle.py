"""Idle time of a timeline in steady state: the share of each period in which a GPU holds no step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from plans.cluster import ClusterSpec
from plans.plan import ExecutionPlan
from plans.program import StepKind
from plans.timeline import Span, Timeline

PASSING = (StepKind.TRANSFER, StepKind.RELEASE)  # these hold nobody


def steady_spans(timeline: Timeline) -> tuple[list[Span], int]:
    """Spans of the iterations after the first (of all, where there is one only), and how many iterations they are.

    In steady state every iteration holds its ranks as long as any other, however iterations overlap.
    """
    numbers = sorted({span.iteration for span in timeline.spans})
    steady = set(numbers[1:] or numbers)
    return [span for span in timeline.spans if span.iteration in steady], len(steady)


def idle_by_rank(timeline: Timeline, cluster: ClusterSpec) -> NDArray[np.float64]:
    """Idle share of every GPU, [ranks]: 1 - seconds held per iteration / period."""
    spans, iterations = steady_spans(timeline)
    busy = np.zeros(cluster.size)
    for span in spans:
        if span.kind not in PASSING:
            busy[list(span.ranks)] += span.duration_s
    if not iterations or timeline.period_s <= 0:
        return np.ones(cluster.size)
    idle: NDArray[np.float64] = np.clip(1.0 - busy / (iterations * timeline.period_s), 0.0, 1.0)
    return idle


def idle_share(timeline: Timeline, cluster: ClusterSpec) -> float:
    """Idle share over all GPUs of the cluster; a GPU that no call uses counts as idle."""
    return float(idle_by_rank(timeline, cluster).mean())


def idle_by_mesh(timeline: Timeline, plan: ExecutionPlan) -> dict[str, float]:
    """Idle share of the GPUs of each mesh in the plan, by its text."""
    by_rank = idle_by_rank(timeline, plan.cluster)
    meshes = dict.fromkeys(planned.mesh for planned in plan.calls)
    return {mesh.text(plan.cluster): float(by_rank[mesh.ranks(plan.cluster)].mean()) for mesh in meshes}
