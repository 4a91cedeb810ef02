"""Plans with one layout of the whole cluster for all calls, on the engine of the searched plan.

symmetric: the best plan in which all calls share one layout of the whole cluster (what Megatron users do: TP inside the
node, PP across nodes, DP over the rest, every degree tried). real-heuristic: TP = GPUs per node, PP = nodes, DP 1 for
all calls, frozen models offloaded (ReaL's `handpicked_model_device_mapping`, mode `model_pipe`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from cost_models.engines.engine import Engine
from planner.limits import Limits
from planner.pricing import Priced, price_call, usable_bytes
from planner.space import Pruned, Shape
from plans.checks import divisors
from plans.cluster import ClusterSpec
from plans.errors import Infeasible
from plans.plan import ExecutionPlan, PlannedCall
from plans.workload import Workload

Chosen = tuple[float, dict[str, int]]


def symmetric(workload: Workload, cluster: ClusterSpec, engine: Engine) -> ExecutionPlan | Infeasible:
    """The best plan with one layout of the whole cluster for every call."""
    degrees = [
        (tp, pp)
        for tp in divisors(cluster.gpus_per_node)
        for pp in range(1, cluster.size // tp + 1)
        if (cluster.size // tp) % pp == 0
    ]
    return _best_uniform(workload, cluster, engine, degrees, frozen_offload=(False, True))


def real_heuristic(workload: Workload, cluster: ClusterSpec, engine: Engine) -> ExecutionPlan | Infeasible:
    """TP over the node, PP over the nodes, DP over what neither divides; frozen models wait in host memory."""
    kv_heads = [spec.kv_heads for spec in workload.models.values()]
    layers = [spec.layers for spec in workload.models.values()]
    tp = max(t for t in divisors(cluster.gpus_per_node) if all(k % t == 0 for k in kv_heads))
    pp = max(p for p in divisors(cluster.nodes) if all(n % p == 0 for n in layers))
    return _best_uniform(workload, cluster, engine, [(tp, pp)], frozen_offload=(True,))


def _best_uniform(
    workload: Workload,
    cluster: ClusterSpec,
    engine: Engine,
    degrees: list[tuple[int, int]],
    frozen_offload: tuple[bool, ...],
) -> ExecutionPlan | Infeasible:
    shape = Shape(cluster.gpus_per_node, cluster.nodes)
    calls = [call.name for call in workload.graph.model_calls]
    priced = {call: price_call(workload, call, cluster, engine, Pruned(), [shape]) for call in calls}
    capacity = usable_bytes(engine.on(cluster, workload.dtype), Limits())
    chosen = [found for tp, pp in degrees for found in _settings(workload, priced, capacity, (tp, pp), frozen_offload)]
    if not chosen:
        return Infeasible(f"no plan with one layout for all calls fits {cluster.size} GPUs", "more GPUs")
    _, picks = min(chosen, key=lambda item: item[0])
    mesh = cluster.whole
    return ExecutionPlan(
        workload=workload,
        cluster=cluster,
        calls=tuple(PlannedCall(call=call, mesh=mesh, strategy=priced[call].strategies[picks[call]]) for call in calls),
    )


def _settings(
    workload: Workload,
    priced: dict[str, Priced],
    capacity: float,
    degrees: tuple[int, int],
    frozen_offload: tuple[bool, ...],
) -> Iterator[Chosen]:
    """For each choice of what is offloaded, the fastest settings of every call that fit beside all residents."""
    trained = {call: workload.graph.call(call).model in workload.graph.trainers for call in priced}
    for frozen, state in product(frozen_offload, (False, True)):
        rows = {
            call: np.array(
                [
                    i
                    for i, s in enumerate(table.strategies)
                    if (s.tp, s.pp, s.vpp) == (*degrees, 1)
                    and s.offload == (frozen if not trained[call] else state and call in _trainers(workload))
                ],
                dtype=np.intp,
            )
            for call, table in priced.items()
        }
        if any(not len(found) for found in rows.values()):
            continue
        resident = sum(float(table.resident[rows[call]].min()) for call, table in priced.items())
        picks: dict[str, int] = {}
        for call, table in priced.items():
            # Every call of a trained model reads the home copy: one layout for all calls.
            transient = table.transient[rows[call]] - table.copy[rows[call]]
            fits = rows[call][resident + transient <= capacity]
            if not len(fits):
                break
            picks[call] = int(fits[table.time_s[fits].argmin()])
        else:
            yield sum(float(priced[call].time_s[i]) for call, i in picks.items()), picks


def _trainers(workload: Workload) -> set[str]:
    return set(workload.graph.trainers.values())
