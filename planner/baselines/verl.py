"""verl: all models on all GPUs, one after the other; the actor trains and generates in different layouts.

From Sheng et al. 2025, "HybridFlow" (sections 5 and 8) and its Megatron examples:

- every role is one worker group over all GPUs; training, log-probs and values run Megatron-like in one (tp, pp) for
  all models, the best of those that fit; sharded optimizer, full or selective recomputation;
- rollout: vLLM with CUDA graphs and a small tensor degree inside the node, no pipeline; the weights are resharded
  between the two layouts every iteration;
- frozen models and optimizer states may wait in host memory (`param_offload`, `optimizer_offload`).

Old log-probs are recomputed where the workload's graph has that call (`--recompute-logprobs`; verl's default).
Passes compute real tokens, packed and balanced over dp (verl's `use_remove_padding` and `use_dynamic_bsz`); vLLM's
cache grows with the responses. Not modelled: preemption where it is full.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

from cost_models.engines.engine import ComposedEngine, Engine, NamedEngine
from cost_models.estimate import CallCost, PlanCost, call_cost, cost_plan
from planner.baselines.base import Contender, Ladder, NoLayoutError, best, climb, price_on, settle
from plans.checks import divisors
from plans.cluster import ClusterSpec
from plans.errors import Infeasible
from plans.graph import Call, CallKind
from plans.plan import ExecutionPlan, PlannedCall
from plans.strategy import ParallelStrategy
from plans.workload import Workload

NAME = "verl"
GENERATION_ENGINE = NamedEngine("cuda-graphs")
CAVEATS = ("sequences are never preempted, however full vLLM's cache is",)
OFFLOADS = ((False, False), (True, False), (True, True))  # frozen models, optimizer states
TRIED = 6


def verl(workload: Workload, cluster: ClusterSpec, engine: Engine) -> Contender | Infeasible:
    """The baseline: `engine` prices training and scoring, its own engine the rollout."""
    both = ComposedEngine(engine.running(CallKind.TRAIN_STEP), GENERATION_ENGINE)

    known: dict[PlannedCall, CallCost] = {}  # plans that are tried differ in a call or two

    def price(plan: ExecutionPlan) -> PlanCost:
        for planned in plan.calls:
            if planned not in known:
                known[planned] = call_cost(plan, planned.call, both)
        return cost_plan(plan, both, known={planned.call: known[planned] for planned in plan.calls})

    costs = []
    for frozen, state in OFFLOADS:
        ranked = sorted(_layouts(workload, cluster, both, frozen, state), key=_fastest_s)
        if not ranked:
            return Infeasible(f"no layout of all models on {cluster.size} GPUs", "another number of GPUs")
        costs.append(best((settle(workload, cluster, ladders, price) for ladders in ranked), most=TRIED))
    cost = best(found for found in reversed(costs) if found)
    assert cost
    engines = f"{both.first.name} for training and scoring, {GENERATION_ENGINE.name} for generation"
    return Contender(name=NAME, cost=cost, engines=engines, caveats=CAVEATS)


def _fastest_s(ladders: list[Ladder]) -> float:
    return sum(ladder.fastest_s for ladder in ladders)


def _layouts(
    workload: Workload, cluster: ClusterSpec, engine: Engine, frozen: bool, state: bool
) -> Iterator[list[Ladder]]:
    """For each (tp, pp) of the trained layout, the ladders of all calls."""
    calls = workload.graph.model_calls
    priced = {call.name: price_on(workload, cluster, call.name, cluster.whole, engine) for call in calls}
    for degrees in product(divisors(cluster.gpus_per_node), divisors(cluster.nodes)):
        keeps = {call.name: partial(_offered, workload, call, degrees, frozen, state) for call in calls}
        try:
            yield [climb(name, cluster.whole, priced[name], keep) for name, keep in keeps.items()]
        except NoLayoutError:
            continue


def _offered(
    workload: Workload, call: Call, degrees: tuple[int, int], frozen: bool, state: bool, strategy: ParallelStrategy
) -> bool:
    if call.kind is CallKind.GENERATE:
        return strategy.pp == 1
    trained = call.model in workload.graph.trainers
    offload = state if call.kind is CallKind.TRAIN_STEP else frozen and not trained
    return (strategy.tp, strategy.pp, strategy.vpp) == (*degrees, 1) and strategy.offload is offload
