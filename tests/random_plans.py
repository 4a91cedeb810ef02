"""Random legal plans of small models, from a seed: any mesh, degrees and settings of every call, and the one-process
plan of the same work that must give the same numbers."""

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
from plans.lora import Lora
from plans.model import ModelSpec
from plans.plan import ExecutionPlan, PlannedCall
from plans.runnable import run_problems
from plans.strategy import ParallelStrategy, Recompute
from plans.workload import Workload, role_spec, with_lora


@dataclass(frozen=True)
class Kind:
    """What a plan is of: an algorithm, an architecture, how many iterations generation runs ahead, the rank of the
    actor's adapters (0: it has none), and whether the actor replays the routes of generation.

    `llama` has trained weights, and real prompts and responses; the others have random weights and prompts, and a
    reward model.
    """

    algorithm: str
    model: str
    staleness: int = 0
    rank: int = 0
    replay: bool = False


KINDS = (
    Kind("ppo", "llama"), Kind("grpo", "experts"), Kind("dpo", "llama"), Kind("rloo", "tied"), Kind("grpo", "llama", 1),
    Kind("remax", "normed"), Kind("ppo", "shared", 1, replay=True), Kind("sft", "llama"),
    Kind("reinforce++", "windowed"), Kind("ppo", "biased", 1), Kind("reward-modelling", "llama"),
    Kind("ppo", "experts", replay=True), Kind("remax", "llama"), Kind("grpo", "llama", rank=4),
    Kind("ppo", "windowed", 1, rank=3), Kind("dpo", "llama", rank=2),
)  # fmt: skip
PLAIN = ModelSpec(name="plain", layers=2, hidden=32, heads=4, kv_heads=4, head_dim=16, ffn=48, vocab=251)
"""A vocabulary that is padded for every tp. A layer costs much time and shows little more than the one before."""
EXPERTS = replace(PLAIN, name="experts", experts=4, experts_per_token=2, kv_heads=2)
SPECS = {
    "experts": EXPERTS,
    "shared": replace(EXPERTS, name="shared", experts=8, shared_ffn=24, normalize_gates=False, qkv_bias=True, layers=3),
    "tied": replace(PLAIN, name="tied", tied_embeddings=True, kv_heads=2, layers=5),
    "normed": replace(PLAIN, name="normed", qk_norm=True, wide_qk_norm=True, post_norms=True, kv_heads=8, heads=8),
    "biased": replace(PLAIN, name="biased", qkv_bias=True, kv_heads=1, tied_embeddings=True, layers=4),
    "windowed": replace(
        PLAIN, name="windowed", layers=3, norms_per_layer=4, norm_offset=True, qk_norm=True, window=9, full_every=3,
        local_rope_theta=100.0, attention_cap=5.0, logit_cap=9.0, embedding_scale=4.0, activation="gelu_tanh",
    ),
}  # fmt: skip
SIZES: Mapping[str, Any] = {"prompt_tokens": 12, "response_tokens": 12, "dtype": "fp32"}
BATCHES = {"grpo": (2, 4), "rloo": (2, 4), "dpo": (4, 2), "reward-modelling": (4, 2)}
"""Prompts, and samples of each, where it is not 8 and 1."""
TRIES = 2000


@dataclass(frozen=True)
class RandomPlan:
    """A plan and the number that it was made from."""

    seed: int
    plan: ExecutionPlan

    @property
    def kind(self) -> Kind:
        """What it is a plan of; kinds take turns."""
        return KINDS[self.seed % len(KINDS)]


def workload_of(kind: Kind) -> Workload:
    """The work of every random plan of a kind."""
    batch, group = BATCHES.get(kind.algorithm, (8, 1))
    trained = kind.model == "llama"
    graph = algorithm_graph(
        kind.algorithm, reward_seconds_per_sample=1e-4 if trained else None, recompute_logprobs=not trained,
        router_replay=kind.replay, staleness=kind.staleness,
    )  # fmt: skip
    spec = load_model(str(TINY)) if trained else SPECS[kind.model]
    models = {role: role_spec(role, spec) for role in graph.roles}
    models = with_lora(graph, models, Lora(kind.rank) if kind.rank else None)
    steps = 2 if KINDS.index(kind) % 3 == 0 else 1
    return Workload(graph=graph, models=models, batch_size=batch, group_size=group, minibatches=steps, **SIZES)


def plan_alone(kind: Kind) -> ExecutionPlan:
    """The plan on one process."""
    workload, cluster = workload_of(kind), load_cluster("local-cpu", gpus=1, gpus_per_node=1)
    lags = workload.graph.first_lags
    calls = [PlannedCall(call=call.name, mesh=cluster.whole, strategy=ParallelStrategy(), lag=lags[call.name])
             for call in workload.graph.model_calls]  # fmt: skip
    return ExecutionPlan(workload=workload, cluster=cluster, calls=tuple(calls))


def random_plan(seed: int) -> RandomPlan:
    """A plan that keeps every rule; kinds take turns. The first hundred, of which CI plays some, have up to 4 ranks,
    the others up to 8."""
    ranks = (1, 2, 2, 4) if seed < 100 else (1, 2, 2, 4, 4, 8)
    draw, kind = random.Random(seed), KINDS[seed % len(KINDS)]
    workload = workload_of(kind)
    gpus = draw.choice(ranks)
    cluster = load_cluster("local-cpu", gpus=gpus, gpus_per_node=gpus)
    meshes = all_meshes(cluster)
    made = {call.name: _call(draw, kind, call.name, meshes, gpus) for call in workload.graph.model_calls}
    for _ in range(TRIES):
        order = _order(draw, workload)
        lags = {name: lag + draw.choice((0, 0, 1)) for name, lag in workload.graph.first_lags.items()}
        calls = tuple(replace(made[name], lag=lags[name]) for name in order)
        plan = ExecutionPlan(workload=workload, cluster=cluster, calls=calls)
        if not check_plan(plan):
            return RandomPlan(seed, plan)
    raise AssertionError(f"no legal order in {TRIES} tries")


def _order(draw: random.Random, workload: Workload) -> list[str]:
    """Model calls in a random order that keeps a call behind what it reads."""
    graph, left, order = workload.graph, [call.name for call in workload.graph.model_calls], list[str]()
    while left:
        waits = {edge.target for edge in graph.model_edges if not edge.distance and edge.source in left}
        order.append(draw.choice([name for name in left if name not in waits]))
        left.remove(order[-1])
    return order


def _call(draw: random.Random, kind: Kind, name: str, meshes: Sequence[DeviceMesh], gpus: int) -> PlannedCall:
    """A call alone that is legal and runs. A larger mesh is as likely as a smaller one."""
    cluster = load_cluster("local-cpu", gpus=gpus, gpus_per_node=gpus)
    plan = replace(plan_alone(kind), cluster=cluster)
    workload, alone = plan.workload, plan.calls
    for _ in range(TRIES):
        size = draw.choice(sorted({mesh.size for mesh in meshes}))
        mesh = draw.choice([mesh for mesh in meshes if mesh.size == size])
        strategy = _strategy(draw, workload, name, mesh.size)
        if strategy is None:
            continue
        lag = workload.graph.first_lags[name]
        planned = PlannedCall(call=name, mesh=mesh, strategy=strategy, lag=lag)
        others = [replace(call, mesh=meshes[0]) for call in alone]
        plan = ExecutionPlan(
            workload=workload, cluster=cluster, calls=tuple(planned if c.call == name else c for c in others)
        )
        if not check_plan(plan) and not run_problems(plan):
            return planned
    raise AssertionError(f"no legal plan of {name} on {gpus} ranks in {TRIES} tries")


def _strategy(draw: random.Random, workload: Workload, name: str, size: int) -> ParallelStrategy | None:
    """Degrees and settings of a call, of which some do not go together. Half of the generations with experts spread
    them over replicas, where there are some."""
    graph, spec = workload.graph, workload.spec(name)
    kind = graph.call(name).kind
    if spread := bool(spec.experts) and kind is CallKind.GENERATE and draw.random() < 0.5:
        tp, pp = draw.choice(divisors(max(1, size // 2))), 1
    else:
        tp = draw.choice(divisors(size))
        pp = draw.choice(divisors(size // tp))
    cp = draw.choice(divisors(size // tp // pp)) if kind is not CallKind.GENERATE else 1
    settings: dict[str, Any] = {"dp": size // tp // pp // cp, "tp": tp, "pp": pp, "cp": cp}
    if pp > spec.layers:
        return None
    if spec.experts:
        legal = [ep for ep in divisors(spec.experts) if (size // pp) % ep == 0]
        settings["ep"] = legal[-1] if spread else draw.choice(legal)
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
        settings["micro_batches"] = draw.choice([n for n in divisors(share) if n <= 4]) if share else 1
    if kind is CallKind.TRAIN_STEP:
        settings["vpp"] = draw.choice((1, 1, 2)) if pp > 1 else 1
        settings["recompute"] = draw.choice(tuple(Recompute))
        settings["shard_optimizer"] = draw.random() < 0.5
    frozen = graph.call(name).model not in graph.trainers
    settings["offload"] = (frozen or kind is CallKind.TRAIN_STEP) and draw.random() < 0.3
    return ParallelStrategy(**settings)
