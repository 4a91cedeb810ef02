"""What more hardware would bring: one more node, a faster network, more memory, each with a short search of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cost_models.estimate import PlanCost, cost_plan
from planner.best import Effort, Found, best_plan
from plans.cluster import ClusterSpec
from plans.plan import ExecutionPlan


@dataclass(frozen=True, slots=True)
class Upgrade:
    """A changed cluster. iteration_s: the best plan seen on it; saved_s: against the best plan seen on the present
    cluster by the same search."""

    change: str
    iteration_s: float
    saved_s: float


def upgraded(cluster: ClusterSpec) -> Iterator[tuple[str, ClusterSpec]]:
    """The changes that are tried."""
    yield f"one more node of {cluster.gpus_per_node} GPUs", replace(cluster, nodes=cluster.nodes + 1)
    if cluster.nodes > 1:
        faster = replace(cluster, inter_node_gbps=2 * cluster.inter_node_gbps)
        yield f"twice the network ({faster.inter_node_gbps:g} GB/s per GPU between nodes)", faster
    gpu = replace(cluster.gpu, memory_gib=1.25 * cluster.gpu.memory_gib)
    yield f"25 % more GPU memory ({gpu.memory_gib:g} GiB)", replace(cluster, gpu=gpu)


def upgrades(
    best: PlanCost, plan: ExecutionPlan, effort: Effort, progress: Callable[[str], None]
) -> tuple[Upgrade, ...]:
    """Value of each change. `best` is the best known plan of the present cluster."""
    found = []
    for words, cluster in upgraded(plan.cluster):
        progress(f"searching with {words}")
        seconds = [best.iteration_s]
        kept = _kept(best, cluster)
        seconds += [kept.iteration_s] if kept else []
        other = best_plan(plan.workload, cluster, best.engine, effort=effort, start=best.program.plan)
        seconds += [other.cost.iteration_s] if isinstance(other, Found) and other.cost.fits else []
        least = min(seconds)
        found.append(Upgrade(words, least, best.iteration_s - least))
    return tuple(found)


def _kept(best: PlanCost, cluster: ClusterSpec) -> PlanCost | None:
    """The known plan as it is on the other cluster."""
    cost = cost_plan(replace(best.program.plan, cluster=cluster, estimate=None), best.engine)
    return cost if cost.fits else None
