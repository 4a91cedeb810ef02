"""Plans and run files of the tests' small model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plans.algorithms import algorithm_graph
from plans.checks import check_plan
from plans.cluster import ClusterSpec, DeviceMesh, parse_mesh
from plans.library import load_cluster, load_model
from plans.lora import Lora
from plans.plan import ExecutionPlan, PlannedCall
from plans.runfile import RunFile
from plans.strategy import ParallelStrategy, parse_degrees
from plans.workload import Workload, with_lora

FIXTURES = Path(__file__).parent / "fixtures"
TINY = FIXTURES / "tiny-llama"
REWARDS = Path(__file__).parent / "reward_cases.py"
CALLS = ("actor_generate", "ref_infer", "critic_infer", "actor_train", "critic_train")

SEVEN_CALLS = (
    "actor_generate", "reward_infer", "ref_infer", "critic_infer", "actor_infer", "actor_train", "critic_train",
)  # fmt: skip

CRITIC_FREE = ("actor_generate", "ref_infer", "actor_train")

Place = str | tuple[str, str] | tuple[str, str, Mapping[str, Any]]


def tiny_plan(
    gpus: int,
    places: Mapping[str, Place] | str,
    *,
    algorithm: str = "ppo",
    order: Sequence[str] = CALLS,
    reward_model: bool = False,
    staleness: int = 0,
    lora: Lora | None = None,
    nodes: int = 1,
    **sizes: Any,
) -> ExecutionPlan:
    """A plan of the small model on a CPU node of `gpus` ranks, or on equal `nodes` that have so many together.

    places: one strategy for every call on the whole node, or call -> strategy | (mesh, strategy) | with settings, of
    which `lag` is the call's (else the least). With `reward_model` the graph has no function and recomputes
    log-probabilities.
    """
    cluster = load_cluster("local-cpu", gpus=gpus, gpus_per_node=gpus // nodes)
    spec = load_model(str(TINY))
    graph = algorithm_graph(
        algorithm,
        reward_seconds_per_sample=None if reward_model else 1e-4,
        recompute_logprobs=reward_model,
        staleness=staleness,
    )
    models = {role: spec.with_value_head() if role in ("critic", "reward") else spec for role in graph.roles}
    workload = Workload(
        graph=graph,
        models=with_lora(graph, models, lora),
        **({"batch_size": 8, "prompt_tokens": 8, "response_tokens": 8, "minibatches": 2, "dtype": "fp32"} | sizes),
    )
    calls, whole = [], cluster.whole.text(cluster)
    for name in order:
        place = places if isinstance(places, str) else places[name]
        mesh, degrees, settings = ((whole, place, {}) if isinstance(place, str) else (*place, {}))[:3]
        lag = settings.get("lag", graph.first_lags[name])
        strategy = ParallelStrategy(**parse_degrees(degrees), **{k: v for k, v in settings.items() if k != "lag"})
        calls.append(PlannedCall(call=name, mesh=parse_mesh(mesh, cluster), strategy=strategy, lag=lag))
    plan = ExecutionPlan(workload=workload, cluster=cluster, calls=tuple(calls))
    assert not check_plan(plan), check_plan(plan)
    return plan


def tiny_run(output: Path, **keys: Any) -> RunFile:
    """A run file of the small model with real prompts and a reward of the tests' own."""
    optimizer = {"lr": 3e-4, "clip": 1.0}
    data: dict[str, Any] = {
        "weights": str(TINY),
        "data": {"source": str(FIXTURES / "prompts.jsonl")},
        "reward": f"{REWARDS}:vowels",
        "actor": optimizer,
        "critic": optimizer,
        "iterations": 3,
        "timeout_s": 60,
        "output": str(output),
        "checkpoint": {"every": 0},
        "report": False,
    }
    return RunFile.model_validate(data | keys)


def examples(path: Path) -> Path:
    """A data file with given responses of different lengths for the prompts of the tests."""
    rows = []
    for number, line in enumerate((FIXTURES / "prompts.jsonl").read_text().splitlines()):
        good, bad = ["good"] * (1 + number % 4), ["the", "bad"] * (1 + number % 3)
        texts = {"response": " ".join(good), "chosen": " ".join(good), "rejected": " ".join(bad)}
        rows.append(json.dumps(json.loads(line) | texts) + "\n")
    path.write_text("".join(rows))
    return path


def all_meshes(cluster: ClusterSpec) -> list[DeviceMesh]:
    """Every legal mesh: aligned power-of-two parts of each node, then runs of whole nodes by growing length."""
    per_node = cluster.gpus_per_node
    meshes = []
    size = 1
    while size < per_node:
        for node in range(cluster.nodes):
            for first in range(0, per_node - size + 1, size):
                meshes.append(DeviceMesh(first_node=node, nodes=1, first_gpu=first, gpus=size))
        size *= 2
    for count in range(1, cluster.nodes + 1):
        for node in range(cluster.nodes - count + 1):
            meshes.append(DeviceMesh(first_node=node, nodes=count, first_gpu=0, gpus=per_node))
    return meshes
