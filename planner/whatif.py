"""What a plan would cost under other circumstances: another network, batch, response length, GPU, or number of GPUs.

The plan itself is kept. With another number of GPUs every mesh and every dp degree grows (or shrinks) by the same
factor, which is what an engineer would try first; a new search may find better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from fractions import Fraction

from plans.checks import check_plan
from plans.cluster import ClusterSpec, GpuSpec, check_mesh
from plans.errors import SpecError, nearest
from plans.library import load_gpu
from plans.plan import ExecutionPlan, PlannedCall
from plans.workload import Workload

_WORKLOAD = ("batch_size", "group_size", "prompt_tokens", "response_tokens", "mean_response_tokens", "minibatches")
_CLUSTER = ("inter_node_gbps", "host_memory_gib")
_GPU = tuple(f.name for f in fields(GpuSpec) if f.name != "name")
KEYS = ("gpus", "gpu", *_WORKLOAD, *_CLUSTER, *_GPU)


def what_if(plan: ExecutionPlan, changes: Sequence[str]) -> ExecutionPlan:
    """The plan under `key=value` changes; raises when the plan is not legal there."""
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or key not in KEYS:
            raise SpecError(f"--what-if `{change}` is not one of the known changes", nearest(key, KEYS))
        plan = _changed(plan, key, value)
    problems = check_plan(plan)
    if problems:
        raise SpecError(f"the plan is not legal under {', '.join(changes)}: {problems[0].message}", problems[0].hint)
    return replace(plan, estimate=None)


def _changed(plan: ExecutionPlan, key: str, value: str) -> ExecutionPlan:
    if key == "gpu":
        return replace(plan, cluster=replace(plan.cluster, gpu=load_gpu(value)))
    number = _number(key, value)
    if key == "gpus":
        return _scaled(plan, number)
    if key in _WORKLOAD:
        workload: Workload = replace(plan.workload, **{key: int(number)})  # type: ignore[arg-type]
        return replace(plan, workload=workload)
    if key in _CLUSTER:
        return replace(plan, cluster=replace(plan.cluster, **{key: number}))  # type: ignore[arg-type]
    gpu = replace(plan.cluster.gpu, **{key: number})  # type: ignore[arg-type]
    return replace(plan, cluster=replace(plan.cluster, gpu=gpu))


def _number(key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise SpecError(f"--what-if {key}: `{value}` is not a number") from None
    if number <= 0:
        raise SpecError(f"--what-if {key}: {value} is not positive")
    return number


def _scaled(plan: ExecutionPlan, gpus: float) -> ExecutionPlan:
    old = plan.cluster
    if gpus % old.gpus_per_node:
        raise SpecError(
            f"--what-if gpus={gpus:g}: not a whole number of nodes of {old.gpus_per_node}",
            f"{int(gpus // old.gpus_per_node + 1) * old.gpus_per_node}",
        )
    factor = Fraction(int(gpus), old.size)
    cluster = replace(old, nodes=int(gpus) // old.gpus_per_node)
    return replace(plan, cluster=cluster, calls=tuple(_grown(p, factor, cluster) for p in plan.calls))


def _grown(planned: PlannedCall, factor: Fraction, cluster: ClusterSpec) -> PlannedCall:
    """The call on a mesh and with a dp of `factor` times the size; micro-batches keep their number of samples."""
    nodes, first = planned.mesh.nodes * factor, planned.mesh.first_node * factor
    dp, count = planned.strategy.dp * factor, planned.strategy.micro_batches / factor
    if nodes.denominator > 1 or first.denominator > 1 or dp.denominator > 1:
        raise SpecError(
            f"--what-if gpus={cluster.size}: `{planned.call}` on {planned.mesh.size} GPUs does not scale by {factor}",
            "a power of two times the present number, or search anew",
        )
    mesh = replace(planned.mesh, nodes=int(nodes), first_node=int(first))
    check_mesh(mesh, cluster)
    strategy = replace(planned.strategy, dp=int(dp), micro_batches=max(1, int(count)))
    return replace(planned, mesh=mesh, strategy=strategy)
