"""What the replay of routes costs: bytes of transfers and of memory, counted by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from cost_models.engines.engine import MEGATRON
from cost_models.estimate import call_cost, cost_plan
from plans.algorithms import algorithm_graph
from plans.batches import batch_transfers
from plans.cluster import parse_mesh
from plans.library import load_cluster, load_model
from plans.plan import ExecutionPlan, PlannedCall
from plans.routes import route_token_bytes
from plans.strategy import ParallelStrategy, parse_degrees
from plans.workload import Workload

NAME = "transfer actor_generate -> actor_train"


def plan_with(*, replays: bool, staleness: int = 0) -> ExecutionPlan:
    """Generation on node 0, training on node 1."""
    cluster = load_cluster("h100-80gb-sxm", gpus=16)
    graph = algorithm_graph("grpo", reward_seconds_per_sample=1e-3, router_replay=replays, staleness=staleness)
    spec = load_model("qwen3-30b-a3b")
    workload = Workload(
        graph=graph, models=dict.fromkeys(graph.roles, spec), batch_size=64, group_size=8, prompt_tokens=1024,
        response_tokens=3072,
    )  # fmt: skip
    places = {"actor_generate": ("node 0", "d2 t4 p1 e4"), "ref_infer": ("node 1", "d8 t1 p1 e8"),
              "actor_train": ("node 1", "d8 t1 p1 e8")}  # fmt: skip
    calls = [
        PlannedCall(call=name, mesh=parse_mesh(mesh, cluster), strategy=ParallelStrategy(**parse_degrees(degrees)))
        for name, (mesh, degrees) in places.items()
    ]
    lags = graph.first_lags
    calls = [replace(call, lag=lags[call.call]) for call in calls]
    return ExecutionPlan(workload=workload, cluster=cluster, calls=tuple(calls))


def test_routes_are_a_byte_per_layer_and_choice_up_to_256_experts() -> None:
    assert route_token_bytes(load_model("qwen3-235b-a22b")) == 94 * 8
    deepseek = load_model("deepseek-v3")
    assert route_token_bytes(deepseek) == (61 - 3) * 8, "three layers are dense"
    assert route_token_bytes(replace(deepseek, experts=257)) == 2 * (61 - 3) * 8


def test_transfers_of_routes_are_priced() -> None:
    """The rank that sends or receives most samples: 48 x 8 bytes a token more."""
    plan = plan_with(replays=True)
    plain, replays = (cost_plan(p).durations.seconds[NAME] for p in (plan_with(replays=False), plan))
    rows = Counter[tuple[str, int]]()
    for message in batch_transfers(plan, "actor_generate")["actor_train"]:
        rows["sends", message.source] += len(message.rows)
        rows["receives", message.target] += len(message.rows)
    assert rows.total() == 2 * 512
    bytes_more = max(rows.values()) * 4096 * 48 * 8
    assert replays - plain == pytest.approx(bytes_more / MEGATRON.on(plan.cluster, "bf16").network_bytes_per_s)


@pytest.mark.parametrize("staleness", [0, 2])
def test_routes_lie_in_memory_from_generation_to_training(staleness: int) -> None:
    """A dp rank's samples, of every iteration under way; in generation also those beside the keys."""
    plain, replays = (plan_with(replays=on, staleness=staleness) for on in (False, True))
    tokens = 4095 * (1 + staleness)
    for call, dp in (("actor_generate", 2), ("actor_train", 8)):
        memory = call_cost(replays, call, MEGATRON).memory
        assert memory.terms["routes"] == 512 / dp * tokens * 48 * 8 and "routes" in memory.resident
        before = call_cost(plain, call, MEGATRON).memory.terms
        beside = before["kv_cache"] * 8 / (2 * 1 * 128 * 2)  # one of four key-value heads, bf16
        assert memory.terms["kv_cache"] == pytest.approx(before["kv_cache"] + beside)
        assert "routes" not in before
    assert call_cost(replays, "ref_infer", MEGATRON) == call_cost(plain, "ref_infer", MEGATRON)
