"""What would be enough where nothing fits: more nodes of the same kind, or more memory on each GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from cost_models.engines.engine import Engine
from planner.best import Effort, Found, best_in, best_plan
from planner.search.portfolio import Method
from planner.space.limits import Limits
from planner.space.pricing import Space, build_space
from plans.cluster import GIB, ClusterSpec
from plans.errors import Infeasible
from plans.plan import ExecutionPlan
from plans.strategy import Recompute
from plans.workload import Workload

MOST_NODES = 8  # times those there are
MOST_MEMORY = 64  # times that of the GPU
SHORT = Effort(method=Method.WALK, seconds=math.inf, evaluations=30_000)


def with_nearest(
    infeasible: Infeasible, workload: Workload, cluster: ClusterSpec, engine: Engine, limits: Limits
) -> Infeasible:
    """The same reason with a hint that says what would fit; unchanged where more memory is no remedy."""
    roomy = least_memory(workload, cluster, engine, limits)
    if roomy is None:
        return infeasible
    gib, plan = roomy
    nodes = least_nodes(workload, cluster, engine, limits)
    memory = f"{gib} GiB per GPU{_saved_by(plan)}"
    if nodes is None:
        return replace(infeasible, hint=f"needs {memory}; {MOST_NODES} times the GPUs are not enough")
    gpus = (nodes - cluster.nodes) * cluster.gpus_per_node
    return replace(infeasible, hint=f"needs {gpus} more {'GPU' if gpus == 1 else 'GPUs'}, or {memory}")


def least_nodes(workload: Workload, cluster: ClusterSpec, engine: Engine, limits: Limits) -> int | None:
    """The fewest nodes, up to `MOST_NODES` times as many, on which a short walk finds a plan."""

    def fits(nodes: int) -> bool:
        found = best_plan(workload, replace(cluster, nodes=nodes), engine, limits, SHORT)
        return isinstance(found, Found)

    return _least(fits, cluster.nodes, MOST_NODES * cluster.nodes)


def least_memory(
    workload: Workload, cluster: ClusterSpec, engine: Engine, limits: Limits
) -> tuple[int, ExecutionPlan] | None:
    """The least memory per GPU, in whole GiB, with which a short walk finds a plan on the cluster, and that plan."""
    most = MOST_MEMORY * cluster.gpu.memory_gib
    larger = replace(cluster, gpu=replace(cluster.gpu, memory_gib=most))
    space = build_space(workload, larger, engine, replace(limits, max_memory_gib=0.0))
    if isinstance(space, Infeasible):
        return None
    context = engine.on(cluster, workload.dtype).context_bytes
    found: dict[int, ExecutionPlan] = {}

    def fits(gib: int) -> bool:
        plan = _fitting(space, gib * GIB - context)
        if plan:
            found[gib] = plan
        return plan is not None

    least = _least(fits, math.floor(context / GIB), math.floor(most))
    return (least, found[least]) if least else None


def _least(fits: Callable[[int], bool], too_few: int, most: int) -> int | None:
    """The least number above `too_few` that fits, found by doubling the step and halving the range."""
    low, step = too_few, 1
    while not fits(high := min(low + step, most)):
        if high == most:
            return None
        low, step = high, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _fitting(space: Space, capacity_bytes: float) -> ExecutionPlan | None:
    """A plan within `capacity_bytes` per GPU, if a short walk finds one."""
    problem = replace(space.problem, capacity_bytes=max(1.0, capacity_bytes))
    found = best_in(replace(space, problem=problem), SHORT)
    return found.plan if isinstance(found, Found) else None


def _saved_by(plan: ExecutionPlan) -> str:
    """How a plan saves memory, in words."""
    strategies = [planned.strategy for planned in plan.calls]
    used = []
    if any(s.recompute is not Recompute.NONE for s in strategies):
        used.append("recompute")
    if any(s.offload for s in strategies):
        used.append("offload")
    return f" with {' and '.join(used)}" if used else ""
