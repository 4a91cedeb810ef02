"""ZeRO-3: weights cut over all data-parallel ranks and gathered layer by layer while a call runs.

A plan's layout says what a rank computes with, so that such calls stand in it as pure data parallelism; what the
sharding costs and saves is added here (training already has it in the `fsdp` engine). Rajbhandari et al. 2020, "ZeRO",
sections 5.3 and 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from cost_models.engines.engine import Engine, NamedEngine
from cost_models.estimate import CallCost, call_cost
from cost_models.memory.moments import CallMemory
from planner.baselines.base import Ladder, climb, price_on
from plans.cluster import ClusterSpec, DeviceMesh
from plans.graph import Call, CallKind
from plans.plan import ExecutionPlan
from plans.strategy import ParallelStrategy, Recompute
from plans.workload import Workload

ENGINE = NamedEngine("fsdp")
GATHERED_LAYERS = 2  # one in use, one prefetched


def ladders(
    workload: Workload,
    cluster: ClusterSpec,
    meshes: Mapping[str, DeviceMesh],
    generation_engine: Engine,
    *,
    frozen: bool = False,
    state: bool = False,
) -> Iterator[Ladder]:
    """What a ZeRO-3 trainer with a tensor-parallel generator offers each call on its mesh: pure data parallelism with
    checkpointed activations, and tp without a pipeline. frozen, state: offload of frozen models and optimizer states.
    """
    for call in workload.graph.model_calls:
        generates = call.kind is CallKind.GENERATE
        keep = partial(_offered, workload, call, frozen, state)
        engine = generation_engine if generates else ENGINE
        mesh = meshes[call.name]
        yield climb(call.name, mesh, price_on(workload, cluster, call.name, mesh, engine), keep)


def _offered(workload: Workload, call: Call, frozen: bool, state: bool, strategy: ParallelStrategy) -> bool:
    if call.kind is CallKind.GENERATE:
        return strategy.pp == 1
    trains = call.kind is CallKind.TRAIN_STEP
    offload = state if trains else frozen and call.model not in workload.graph.trainers
    checkpoints = strategy.recompute is Recompute.FULL or not trains
    return strategy.size == strategy.dp and strategy.offload is offload and checkpoints


def sharded_call(plan: ExecutionPlan, call: str) -> CallCost:
    """Cost of a training step or a forward pass under ZeRO-3."""
    cost = call_cost(plan, call, ENGINE)
    if plan.workload.graph.call(call).kind is not CallKind.INFERENCE:
        return cost
    spec, planned = plan.workload.spec(call), plan.planned(call)
    layer_bytes = float(spec.layer_params * plan.workload.element_bytes)
    seconds = spec.layers * planned.strategy.micro_batches * _gather_s(plan, planned.strategy.dp, layer_bytes)
    constants = ENGINE.on(plan.cluster, plan.workload.dtype).constants
    exposed = seconds - constants.data_overlap * min(seconds, sum(cost.terms.values()))
    return CallCost({**cost.terms, "weight_gather": exposed}, _cut(cost.memory, planned.strategy.dp, layer_bytes))


def _cut(memory: CallMemory, dp: int, layer_bytes: float) -> CallMemory:
    """Weights as one rank's share, and the gathered layers beside them."""
    terms: Mapping[str, float] = {
        **memory.terms,
        "weights": memory.terms["weights"] / dp,
        "workspace": memory.terms["workspace"] + GATHERED_LAYERS * layer_bytes,
    }
    return replace(memory, terms=terms, host=memory.host / dp)


def gather_model_s(plan: ExecutionPlan, call: str, ranks: int) -> float:
    """Seconds in which every rank gathers all layers of a call's model from `ranks` shards once."""
    spec = plan.workload.spec(call)
    return spec.layers * _gather_s(plan, ranks, float(spec.layer_params * plan.workload.element_bytes))


def _gather_s(plan: ExecutionPlan, ranks: int, message: float) -> float:
    """Seconds to gather one layer."""
    cluster = plan.cluster
    machine = ENGINE.on(cluster, plan.workload.dtype)
    size, per_node = np.array([float(ranks)]), np.array([float(min(ranks, cluster.gpus_per_node))])
    return float(machine.kernels.all_gather(np.array([message]), size, per_node)[0])
