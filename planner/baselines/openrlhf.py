"""OpenRLHF: groups of models on GPUs of their own, ZeRO-3 training, a vLLM engine apart.

From its README ("Ray + vLLM"; GPUs of vLLM : actor : critic = 1 : 1 : 1 is the advice; `--colocate_actor_ref`,
`--colocate_critic_reward`) and Hu et al. 2024, "OpenRLHF", section 3:

- actor and reference share one third of the GPUs, critic and reward another, the rest generates; a group has as many
  GPUs as divide a minibatch, what remains goes to generation;
- training and scoring: ZeRO-3 inside the group with activation checkpointing, tensor parallelism in generation alone;
- after each iteration rank 0 of the actor gathers the weights and broadcasts them to the engines over one GPU's
  network link (`_broadcast_to_vllm`);
- synchronous, as published: groups wait for each other.

Not modelled: Ray's object store on the way of batches (10.9 of 94.9 s in the published 34B breakdown).
"""

from __future__ import annotations

from cost_models.engines.engine import Engine, NamedEngine
from cost_models.estimate import PlanCost, call_cost, cost_plan
from planner.baselines import zero3
from planner.baselines.base import Contender, NoLayoutError, best, settle
from planner.space.layouts import shapes
from plans.checks import divisors
from plans.cluster import ClusterSpec, DeviceMesh
from plans.errors import Infeasible
from plans.graph import CallKind
from plans.plan import ExecutionPlan
from plans.program import StepKind, compile_program
from plans.workload import Workload

NAME = "openrlhf"
GENERATION_ENGINE = NamedEngine("cuda-graphs")
CAVEATS = ("batches travel over the network at once, not through Ray's object store",)
ACTOR_ROLES = ("actor", "ref")


def openrlhf(workload: Workload, cluster: ClusterSpec, engine: Engine) -> Contender | Infeasible:
    """The baseline; its own engines price it, whatever engine prices the searched plan."""
    meshes = groups(workload, cluster)
    if isinstance(meshes, Infeasible):
        return meshes
    try:
        cost = best(_settled(workload, cluster, meshes, frozen=frozen) for frozen in (False, True))
    except NoLayoutError as error:
        return error.reason
    assert cost
    engines = f"{zero3.ENGINE.name} for training and scoring, {GENERATION_ENGINE.name} for generation"
    return Contender(name=NAME, cost=cost, engines=engines, caveats=CAVEATS)


def groups(workload: Workload, cluster: ClusterSpec) -> dict[str, DeviceMesh] | Infeasible:
    """Model call -> the mesh of its group: generation from the left, then the trainers."""
    calls = workload.graph.model_calls
    kinds = {call.name: _group(call.kind, call.model) for call in calls}
    trainers = [name for name in ("actor", "critic") if name in kinds.values()]
    parts = len(trainers) + ("vllm" in kinds.values())
    train_sizes = _sizes(cluster, workload.samples // workload.minibatches)
    size = max((s for s in train_sizes if s <= cluster.size // parts), default=0)
    rest = cluster.size - size * len(trainers)
    sizes = [s for s in _sizes(cluster, 0) if s <= rest]
    if not size or not sizes:
        return Infeasible(f"{cluster.size} GPUs do not divide into {parts} groups", f"at least {parts} GPUs")
    generation = _generation_size(workload, sizes, cluster.gpus_per_node)
    meshes = {"vllm": _mesh(cluster, 0, generation)}
    for i, name in enumerate(reversed(trainers)):
        meshes[name] = _mesh(cluster, cluster.size - (i + 1) * size, size)
    return {call: meshes[group] for call, group in kinds.items()}


def _group(kind: CallKind, role: str) -> str:
    if kind is CallKind.GENERATE:
        return "vllm"
    return "actor" if role in ACTOR_ROLES else "critic"


def _sizes(cluster: ClusterSpec, samples: int) -> list[int]:
    """Sizes of meshes that divide `samples` (0: any), ascending."""
    return [s.size for s in shapes(cluster) if not samples or samples % s.size == 0]


def _generation_size(workload: Workload, sizes: list[int], per_node: int) -> int:
    """The most GPUs on which equal engines of at most a node share the samples."""
    legal = [n for n in sizes if any(n % tp == 0 and workload.samples % (n // tp) == 0 for tp in divisors(per_node))]
    return max(legal, default=sizes[0])


def _mesh(cluster: ClusterSpec, first: int, size: int) -> DeviceMesh:
    per_node = cluster.gpus_per_node
    if size < per_node:
        return DeviceMesh(first_node=first // per_node, nodes=1, first_gpu=first % per_node, gpus=size)
    return DeviceMesh(first_node=first // per_node, nodes=size // per_node, first_gpu=0, gpus=per_node)


def _settled(workload: Workload, cluster: ClusterSpec, meshes: dict[str, DeviceMesh], *, frozen: bool) -> PlanCost:
    ladders = zero3.ladders(workload, cluster, meshes, GENERATION_ENGINE, frozen=frozen)
    return settle(workload, cluster, ladders, _price)


def _price(plan: ExecutionPlan) -> PlanCost:
    kinds = {p.call: plan.workload.graph.call(p.call).kind for p in plan.calls}
    costs = {
        call: call_cost(plan, call, GENERATION_ENGINE) if kind is CallKind.GENERATE else zero3.sharded_call(plan, call)
        for call, kind in kinds.items()
    }
    return cost_plan(plan, zero3.ENGINE, known=costs, steps_s=_broadcasts(plan))


def _broadcasts(plan: ExecutionPlan) -> dict[str, float]:
    """Weight sync: the trainers' gather, then all weights over the link of one GPU."""
    workload, cluster = plan.workload, plan.cluster
    machine = zero3.ENGINE.on(cluster, workload.dtype)
    seconds = {}
    for step in compile_program(plan).steps:
        if step.kind is StepKind.REALLOCATE:
            model_bytes = workload.spec(step.subject).params * workload.element_bytes
            trainer = workload.graph.trainers[workload.graph.call(step.subject).model]
            gather = zero3.gather_model_s(plan, step.subject, plan.planned(trainer).mesh.size)
            seconds[step.name] = gather + model_bytes / machine.network_bytes_per_s
    return seconds
