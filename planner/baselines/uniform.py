"""Plans with one layout of the whole cluster for all calls, on the engine of the searched plan.

symmetric: the best plan in which all calls share one layout of the whole cluster (what Megatron users do: TP inside the
node, PP across nodes, DP over the rest, every degree tried). real-heuristic: TP = GPUs per node, PP = nodes, DP 1 for
all calls, frozen models offloaded (ReaL's `handpicked_model_device_mapping`, mode `model_pipe`), with the recomputation
and the micro-batches of the runs that were published; more micro-batches where those do not fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from cost_models.engines.engine import Engine
from cost_models.estimate import PlanCost, cost_plan
from planner.space.layouts import Pruned, Shape
from planner.space.limits import Limits
from planner.space.pricing import Priced, price_call, usable_bytes
from plans.checks import check_plan, divisors
from plans.cluster import GIB, ClusterSpec
from plans.errors import Infeasible
from plans.graph import CallKind
from plans.plan import ExecutionPlan, PlannedCall
from plans.strategy import ParallelStrategy, Recompute
from plans.workload import Workload

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)  # times those of the published runs
TRIED = 24  # candidates that are costed in full until one fits
Degrees = tuple[int, int, int]  # tp, pp, ep: equal for calls that read one copy
Rows = Mapping[tuple[Degrees, bool], NDArray[np.intp]]  # (slices, offload) -> layouts of a call


def symmetric(
    workload: Workload, cluster: ClusterSpec, engine: Engine, limits: Limits | None = None
) -> PlanCost | Infeasible:
    """The cost of the best plan within the limits that has one layout of the whole cluster for every call, and fits."""
    limits = limits or Limits()
    shape = Shape(cluster.gpus_per_node, cluster.nodes)
    calls = [call.name for call in workload.graph.model_calls]
    priced = {call: price_call(workload, call, cluster, engine, Pruned(), [shape]) for call in calls}
    rows = {call: _rows(call, table, cluster, limits) for call, table in priced.items()}
    capacity = usable_bytes(engine.on(cluster, workload.dtype), limits)
    lags = workload.graph.first_lags
    for _, picks in sorted(_settings(workload, priced, rows, capacity), key=lambda item: item[0])[:TRIED]:
        planned = (
            PlannedCall(call=call, mesh=cluster.whole, strategy=priced[call].strategies[i], lag=lags[call])
            for call, i in picks.items()
        )
        plan = ExecutionPlan(workload=workload, cluster=cluster, calls=tuple(planned))
        cost = cost_plan(plan, engine)
        if _within(cost, limits):
            return cost
    return Infeasible(f"no plan with one layout for all calls fits {cluster.size} GPUs", "more GPUs")


def _within(cost: PlanCost, limits: Limits) -> bool:
    return cost.fits and (not limits.max_memory_gib or cost.memory.peak_bytes <= limits.max_memory_gib * GIB)


def _rows(call: str, priced: Priced, cluster: ClusterSpec, limits: Limits) -> Rows:
    """The layouts of a call that the limits allow, by what must be equal for all calls."""
    found: dict[tuple[Degrees, bool], list[int]] = defaultdict(list)
    for i, s in enumerate(priced.strategies):
        if s.vpp == 1 and not limits.refuses(call, cluster.whole, s, cluster):
            found[(s.tp, s.pp, s.ep), s.offload].append(i)
    return {key: np.array(members, dtype=np.intp) for key, members in found.items()}


def _settings(
    workload: Workload, priced: Mapping[str, Priced], rows: Mapping[str, Rows], capacity: float
) -> Iterator[tuple[float, dict[str, int]]]:
    """(seconds of all calls, layout by call): for each way to cut the weights and choice of what is offloaded, the
    fastest settings of every call that fit beside all residents. A dense model is cut by (tp, pp) alone."""
    trainers = set(workload.graph.trainers.values())
    frozen = {call for call in priced if workload.graph.call(call).model not in workload.graph.trainers}
    dense = {call for call in priced if not workload.spec(call).experts}
    every = dict.fromkeys(slices for of_call in rows.values() for slices, _ in of_call)
    for (tp, pp, ep), frozen_away, state_away in product(every, (False, True), (False, True)):
        chosen: dict[str, NDArray[np.intp]] = {}
        for call, of_call in rows.items():
            away = frozen_away if call in frozen else state_away and call in trainers
            chosen[call] = of_call.get(((tp, pp, 1 if call in dense else ep), away), np.zeros(0, np.intp))
        if not all(map(len, chosen.values())):
            continue
        resident = sum(float(priced[call].resident[some].min()) for call, some in chosen.items())
        picks: dict[str, int] = {}
        for call, some in chosen.items():
            # Every call of a trained model reads the home copy: one layout for all calls.
            transient = priced[call].transient[some] - priced[call].copy[some]
            fits = some[resident + transient <= capacity]
            if not len(fits):
                break
            picks[call] = int(fits[priced[call].time_s[fits].argmin()])
        else:
            yield sum(float(priced[call].time_s[i]) for call, i in picks.items()), picks


def real_heuristic(workload: Workload, cluster: ClusterSpec, engine: Engine) -> PlanCost | Infeasible:
    """The cost of this plan: TP over the node, PP over the nodes, DP over what neither divides; frozen models wait in
    host memory. As it was measured: all activations recomputed, and as many micro-batches as stages, twice as many in
    training."""
    kv_heads = [spec.kv_heads for spec in workload.models.values()]
    layers = [spec.layers for spec in workload.models.values()]
    tp = max(t for t in divisors(cluster.gpus_per_node) if all(k % t == 0 for k in kv_heads))
    pp = max(p for p in divisors(cluster.nodes) if all(n % p == 0 for n in layers))
    base = ParallelStrategy(dp=cluster.size // (tp * pp), tp=tp, pp=pp)
    experts = any(spec.experts for spec in workload.models.values())
    found: PlanCost | None = None
    for times in MICRO_BATCHES:
        plans = [_heuristic_plan(workload, cluster, base, ep, times) for ep in (divisors(base.dp) if experts else (1,))]
        costs = [cost_plan(plan, engine) for plan in plans if not check_plan(plan)]
        fastest = min(costs, key=lambda cost: (not cost.fits, cost.iteration_s), default=None)
        if fastest and (found is None or fastest.fits):
            found = fastest
        if fastest and fastest.fits:
            break
    return found or Infeasible(f"no legal layout of this kind on {cluster.size} GPUs", "another number of GPUs")


def _heuristic_plan(
    workload: Workload, cluster: ClusterSpec, base: ParallelStrategy, ep: int, times: int
) -> ExecutionPlan:
    """times: micro-batches against those of the published runs."""
    calls = []
    for call in workload.graph.model_calls:
        trains, generates = call.kind is CallKind.TRAIN_STEP, call.kind is CallKind.GENERATE
        parallel = not generates and base.tp > 1 and workload.tokens % base.tp == 0
        strategy = replace(base, ep=ep if workload.spec(call.name).experts else 1, sequence_parallel=parallel)
        share = max(1, workload.samples_per_step(call.name) // base.dp)
        if generates:
            strategy = replace(strategy, groups=base.pp if share % base.pp == 0 else 1)
        else:
            wanted = times * base.pp * (2 if trains else 1)
            parts = max(count for count in divisors(share) if count <= wanted)
            strategy = replace(strategy, micro_batches=parts, offload=call.model not in workload.graph.trainers)
        if trains:
            strategy = replace(strategy, recompute=Recompute.FULL)
        lag = workload.graph.first_lags[call.name]
        calls.append(PlannedCall(call=call.name, mesh=cluster.whole, strategy=strategy, lag=lag))
    return ExecutionPlan(workload=workload, cluster=cluster, calls=tuple(calls))
