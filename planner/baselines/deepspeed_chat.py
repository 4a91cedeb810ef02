"""DeepSpeed-Chat: all models on all GPUs, ZeRO-3 data parallelism, the actor generates in a hybrid engine.

From its paper (Yao et al. 2023, sections 4 and 5) and the documentation of its step 3:

- training and scoring: ZeRO-3 over all GPUs with activation checkpointing, one after the other;
- generation: before it, the hybrid engine gathers the actor's weights and cuts them with tensor parallelism inside
  nodes (`inference_tp_size`); the tp degree is chosen as the fastest that fits;
- offload of frozen models and of optimizer states where nothing else fits (`--offload_reference_model`, `--offload`).

Not modelled: gathering the weights anew for every generated token, which versions without injected kernels for the
architecture do, and the fragmentation of its gather buffers. Both make the real system slower than this estimate.
"""

from __future__ import annotations

from cost_models.engines.engine import Engine, NamedEngine
from cost_models.estimate import CallCost, PlanCost, call_cost, cost_plan
from planner.baselines import zero3
from planner.baselines.base import Contender, NoLayoutError, best, settle
from plans.cluster import ClusterSpec
from plans.errors import Infeasible
from plans.graph import CallKind
from plans.plan import ExecutionPlan
from plans.workload import Workload

NAME = "deepspeed-chat"
GENERATION_ENGINE = NamedEngine("eager")
CAVEATS = ("weights are gathered once per generate call, not once per token",)
OFFLOADS = ((False, False), (True, False), (True, True))  # frozen models, optimizer states


def deepspeed_chat(workload: Workload, cluster: ClusterSpec, engine: Engine) -> Contender | Infeasible:
    """The baseline; its own engines price it, whatever engine prices the searched plan."""
    try:
        cost = best(_settled(workload, cluster, *offload) for offload in OFFLOADS)
    except NoLayoutError as error:
        return error.reason
    assert cost
    engines = f"{zero3.ENGINE.name} for training and scoring, {GENERATION_ENGINE.name} for generation"
    return Contender(name=NAME, cost=cost, engines=engines, caveats=CAVEATS)


def _settled(workload: Workload, cluster: ClusterSpec, frozen: bool, state: bool) -> PlanCost:
    meshes = {call.name: cluster.whole for call in workload.graph.model_calls}
    ladders = zero3.ladders(workload, cluster, meshes, GENERATION_ENGINE, frozen=frozen, state=state)
    return settle(workload, cluster, ladders, _price)


def _price(plan: ExecutionPlan) -> PlanCost:
    calls = {p.call: plan.workload.graph.call(p.call).kind for p in plan.calls}
    costs = {
        call: _hybrid(plan, call) if kind is CallKind.GENERATE else zero3.sharded_call(plan, call)
        for call, kind in calls.items()
    }
    return cost_plan(plan, zero3.ENGINE, known=costs)


def _hybrid(plan: ExecutionPlan, call: str) -> CallCost:
    """Generation in the hybrid engine: every GPU gathers the weights, then keeps its tensor-parallel slice."""
    cost = call_cost(plan, call, GENERATION_ENGINE)
    return CallCost({**cost.terms, "weight_gather": zero3.gather_model_s(plan, call, plan.cluster.size)}, cost.memory)
