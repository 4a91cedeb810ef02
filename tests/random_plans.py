"""Random legal plans of the tests' small model, from a seed: any mesh, degrees and settings of every call, and the
one-process plan of the same work that must give the same numbers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from plan_cases import TINY, all_meshes

from plans.algorithms import algorithm_graph
from plans.batches import unit_of
from plans.checks import check_plan, divisors
from plans.cluster import DeviceMesh
from plans.graph import CallKind
from plans.library import load_cluster, load_model
from plans.plan import ExecutionPlan, PlannedCall
from plans.runnable import run_problems
from plans.strategy import ParallelStrategy, Recompute
from plans.workload import Workload, role_spec

ALGORITHMS = ("ppo", "grpo", "dpo", "sft")
SIZES: Mapping[str, Any] = {"prompt_tokens": 24, "response_tokens": 40, "minibatches": 2, "dtype": "fp32"}
BATCHES = {"ppo": (8, 1), "grpo": (2, 4), "dpo": (4, 2), "sft": (8, 1)}
"""Prompts, and samples of each."""
TRIES = 2000


@dataclass(frozen=True)
class RandomPlan:
    """A plan and the number that it was made from."""

    seed: int
    plan: ExecutionPlan

    @property
    def algorithm(self) -> str:
        """Name of the algorithm."""
        return self.plan.workload.graph.name


def workload_of(algorithm: str) -> Workload:
    """The work of every random plan of an algorithm."""
    batch, group = BATCHES[algorithm]
    graph = algorithm_graph(algorithm, reward_seconds_per_sample=1e-4)
    spec = load_model(str(TINY))
    models = {role: role_spec(role, spec) for role in graph.roles}
    return Workload(graph=graph, models=models, batch_size=batch, group_size=group, **SIZES)


def plan_alone(algorithm: str) -> ExecutionPlan:
    """The plan on one process."""
    workload, cluster = workload_of(algorithm), load_cluster("local-cpu", gpus=1, gpus_per_node=1)
    calls = [PlannedCall(call=call.name, mesh=cluster.whole, strategy=ParallelStrategy())
             for call in workload.graph.model_calls]  # fmt: skip
    return ExecutionPlan(workload=workload, cluster=cluster, calls=tuple(calls))


def random_plan(seed: int, ranks: Sequence[int] = (2, 4)) -> RandomPlan:
    """A plan that keeps every rule; the algorithms take turns."""
    draw = random.Random(seed)
    workload = workload_of(ALGORITHMS[seed % len(ALGORITHMS)])
    gpus = draw.choice(ranks)
    cluster = load_cluster("local-cpu", gpus=gpus, gpus_per_node=gpus)
    meshes = all_meshes(cluster)
    calls = [_call(draw, workload, name, meshes, gpus) for name in _order(draw, workload)]
    plan = ExecutionPlan(workload=workload, cluster=cluster, calls=tuple(calls))
    late = replace(plan, calls=tuple(replace(call, lag=draw.choice((0, 0, 1))) for call in calls))
    return RandomPlan(seed, plan if check_plan(late) else late)


def _order(draw: random.Random, workload: Workload) -> list[str]:
    """Model calls in a random order that keeps a call behind what it reads."""
    graph, left, order = workload.graph, [call.name for call in workload.graph.model_calls], list[str]()
    while left:
        waits = {edge.target for edge in graph.model_edges if not edge.distance and edge.source in left}
        order.append(draw.choice([name for name in left if name not in waits]))
        left.remove(order[-1])
    return order


def _call(draw: random.Random, workload: Workload, name: str, meshes: Sequence[DeviceMesh], gpus: int) -> PlannedCall:
    """A call alone that is legal and runs. A larger mesh is as likely as a smaller one."""
    cluster = load_cluster("local-cpu", gpus=gpus, gpus_per_node=gpus)
    alone = replace(plan_alone(workload.graph.name), cluster=cluster).calls
    for _ in range(TRIES):
        size = draw.choice(sorted({mesh.size for mesh in meshes}))
        mesh = draw.choice([mesh for mesh in meshes if mesh.size == size])
        planned = PlannedCall(call=name, mesh=mesh, strategy=_strategy(draw, workload, name, mesh.size))
        others = [replace(call, mesh=meshes[0]) for call in alone]
        plan = ExecutionPlan(
            workload=workload, cluster=cluster, calls=tuple(planned if c.call == name else c for c in others)
        )
        if not check_plan(plan) and not run_problems(plan):
            return planned
    raise AssertionError(f"no legal plan of {name} on {gpus} ranks in {TRIES} tries")


def _strategy(draw: random.Random, workload: Workload, name: str, size: int) -> ParallelStrategy:
    """Degrees and settings of a call, of which some do not go together."""
    graph, spec = workload.graph, workload.spec(name)
    kind = graph.call(name).kind
    tp = draw.choice(divisors(size))
    pp = draw.choice(divisors(size // tp))
    settings: dict[str, Any] = {"dp": size // tp // pp, "tp": tp, "pp": pp}
    share = workload.samples_per_step(name) // settings["dp"]
    if pp > 1 and draw.random() < 0.3:
        cut = sorted(draw.sample(range(1, spec.layers), pp - 1))
        settings["layers_per_stage"] = tuple(b - a for a, b in zip([0, *cut], [*cut, spec.layers], strict=True))
    if kind is CallKind.GENERATE:
        settings["groups"] = draw.choice(divisors(pp))
        settings["slots"] = draw.choice((0, *range(settings["groups"], share + 1)))
        return ParallelStrategy(**settings)
    settings["sequence_parallel"] = tp > 1 and draw.random() < 0.5
    if draw.random() < 0.5:
        longest = unit_of(workload, name) * workload.tokens
        settings["micro_batch_tokens"] = draw.randint(longest, 4 * longest)
    else:
        settings["micro_batches"] = draw.choice(divisors(share)) if share else 1
    if kind is CallKind.TRAIN_STEP:
        settings["vpp"] = draw.choice((1, 1, 2)) if pp > 1 else 1
        settings["recompute"] = draw.choice(tuple(Recompute))
        settings["shard_optimizer"] = draw.random() < 0.5
    frozen = graph.call(name).model not in graph.trainers
    settings["offload"] = (frozen or kind is CallKind.TRAIN_STEP) and draw.random() < 0.3
    return ParallelStrategy(**settings)
