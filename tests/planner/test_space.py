"""The space: which layouts are tried, and which reasons keep others out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from plan_cases import TINY
from random_plans import SPECS

import plans.library
from cost_models.engines.engine import MEGATRON
from planner.request import build_request
from planner.space.layouts import Pruned, Shape, positions, shapes, strategies
from planner.space.limits import Limits
from planner.space.pricing import Space, build_space
from plans.algorithms import algorithm_graph, ppo
from plans.checks import CALL_CHECKS, check_plan
from plans.cluster import ClusterSpec
from plans.graphfile import load_graph
from plans.library import load_cluster, load_model
from plans.plan import ExecutionPlan, PlannedCall
from plans.runfile import load_run
from plans.runnable import run_problems, workload_problems
from plans.strategy import ParallelStrategy
from plans.workload import Workload, role_spec


def workload(model: str, tokens: int = 1024) -> Workload:
    spec = load_model(model)
    value = spec.with_value_head()
    models = {"actor": spec, "ref": spec, "critic": value, "reward": value}
    return Workload(graph=ppo(), models=models, prompt_tokens=tokens, response_tokens=tokens)


def every(work: Workload, call: str, cluster: ClusterSpec, *, context: bool = False) -> list[PlannedCall]:
    found = []
    for shape in shapes(cluster):
        for strategy in strategies(work, call, shape, Pruned(), context_parallel=context):
            found.append(PlannedCall(call=call, mesh=shape.at(0), strategy=strategy))
    return found


def test_every_layout_of_the_space_passes_the_checks_of_a_plan() -> None:
    cluster = load_cluster("h100-80gb-sxm", gpus=32)
    for model, context in (("llama-7b", True), ("mixtral-8x7b", False)):
        work = workload(model)
        plan = ExecutionPlan(workload=work, cluster=cluster, calls=())
        for call in work.graph.model_calls:
            for planned in every(work, call.name, cluster, context=context):
                spec = work.spec(call.name)
                assert not [p for check in CALL_CHECKS for p in check(plan, planned, spec)], planned


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo", "remax", "dpo", "sft", "reward-modelling"])
@pytest.mark.parametrize("kind", ["biased", "experts", "normed", "tied"])
def test_what_search_may_write_for_this_engine_runs(algorithm: str, kind: str) -> None:
    """Every layout that the space of the default engine keeps for a call is one that the runtime takes."""
    graph, cluster = algorithm_graph(algorithm), load_cluster("h100-80gb-sxm", gpus=8)
    models = {role: role_spec(role, SPECS[kind]) for role in graph.roles}
    group = {"grpo": 4, "rloo": 4, "dpo": 2, "reward-modelling": 2}.get(algorithm, 1)
    work = Workload(graph=graph, models=models, batch_size=16, group_size=group, prompt_tokens=64, response_tokens=8128,
                    mean_response_tokens=2000, allow_long=True)  # fmt: skip
    space = build_space(work, cluster, MEGATRON, Limits())
    assert isinstance(space, Space)
    first = {name: options[0] for name, options in space.options.items()}
    seen = set()
    for name, options in space.options.items():
        for mesh, strategy in options:
            if (name, strategy) in seen:
                continue
            seen.add((name, strategy))
            calls = [
                PlannedCall(call=call, mesh=m, strategy=s)
                for call, (m, s) in (first | {name: (mesh, strategy)}).items()
            ]
            plan = ExecutionPlan(workload=work, cluster=cluster, calls=tuple(calls))
            assert not run_problems(plan), (name, strategy)
    assert len({s.ep for options in space.options.values() for _, s in options}) > 1 or kind != "experts"
    assert any(s.cp > 1 for options in space.options.values() for _, s in options), "context parallelism is tried"


def test_unequal_lengths_are_packed_by_tokens() -> None:
    """Bounds that hold the longest sample, or pair, in every call that packs; all legal and run by the runtime."""
    cluster = load_cluster("h100-80gb-sxm", gpus=8)
    work = replace(workload("llama-7b"), mean_response_tokens=300)
    pairs = replace(work, graph=algorithm_graph("dpo"), group_size=2)
    for case, call, least in ((work, "ref_infer", 2048), (work, "actor_train", 2048), (pairs, "actor_train", 4096)):
        plan = ExecutionPlan(workload=case, cluster=cluster, calls=())
        found = every(case, call, cluster)
        assert {p.strategy.micro_batches for p in found} == {1}
        assert min(p.strategy.micro_batch_tokens for p in found) == least
        assert any(p.strategy.vpp > 1 for p in found) == (call == "actor_train")
        for planned in found:
            assert not [p for check in CALL_CHECKS for p in check(plan, planned, case.spec(call))], planned


def test_small_space_equals_plain_enumeration_of_degrees() -> None:
    cluster = load_cluster("h100-80gb-sxm", gpus=16)
    work = workload("llama-7b")
    found = {(p.mesh.size, p.strategy.dp, p.strategy.tp, p.strategy.pp) for p in every(work, "ref_infer", cluster)}
    expected = {
        (size, size // (tp * pp), tp, pp)
        for size in (1, 2, 4, 8, 16)
        for tp in (1, 2, 4, 8)
        for pp in (1, 2, 4, 8, 16, 32)
        if tp <= min(size, 8) and size % (tp * pp) == 0
    }
    assert found == expected


def test_context_and_expert_degrees_appear_where_they_can() -> None:
    cluster = load_cluster("h100-80gb-sxm", gpus=16)
    long = workload("llama-7b", tokens=16384)
    assert {p.strategy.cp for p in every(long, "actor_train", cluster, context=True)} == {1, 2, 4, 8}
    assert {p.strategy.cp for p in every(long, "actor_train", cluster)} == {1}
    assert {p.strategy.ep for p in every(workload("mixtral-8x7b"), "actor_train", cluster)} == {1, 2, 4, 8}
    train = every(workload("llama-7b"), "actor_train", cluster)
    assert {p.strategy.shard_optimizer for p in train} == {True, False}
    assert all(p.strategy.shard_optimizer for p in train if p.strategy.dp == 1)


def test_what_is_left_out_is_counted() -> None:
    pruned = Pruned()
    list(strategies(workload("llama2-70b"), "actor_train", Shape(8, 2), pruned, context_parallel=False))
    assert pruned.counts["pp x cp must divide the GPUs left by tp"] > 0
    assert pruned.counts["this engine has no context parallelism"] > 0
    assert ParallelStrategy().shard_optimizer


def test_positions_cover_the_cluster_without_leaving_it() -> None:
    for gpus in (8, 16, 128, 1024):
        cluster = load_cluster("h100-80gb-sxm", gpus=gpus)
        for shape in shapes(cluster):
            ranks = [mesh.ranks(cluster) for mesh in positions(shape, cluster)]
            assert ranks[0].start == 0 and ranks[-1].stop == cluster.size
            assert all(r.start >= 0 and r.stop <= cluster.size and len(r) == shape.size for r in ranks)


@pytest.mark.parametrize("name", ["two-rewards", "distillation"])
def test_own_graphs_that_ship_with_an_experiment_are_found_and_run(name: str) -> None:
    library = Path(plans.library.__file__).parent
    graph, run = load_graph(library / "graphs" / f"{name}.yaml"), library / "experiments" / f"{name}.yaml"
    models = {role: str(TINY) for role in graph.roles}
    request = build_request(models=models, run=run, own_graph=graph, cluster="local-cpu", gpus=2)
    space = build_space(request.workload, request.cluster, MEGATRON, Limits())
    assert isinstance(space, Space)
    calls = [PlannedCall(call=call, mesh=m, strategy=s) for call, ((m, s), *_) in space.options.items()]
    plan = ExecutionPlan(workload=request.workload, cluster=request.cluster, calls=tuple(calls))
    assert not check_plan(plan) and not run_problems(plan)
    weights = load_run(run).weights
    assert isinstance(weights, dict) and set(weights) == set(graph.roles), "weights of every role are named"


@pytest.mark.parametrize(("algorithm", "size"), [("grpo", 8), ("rloo", 8), ("ppo", 1), ("dpo", 2), ("sft", 1)])
def test_a_request_without_a_group_size_has_one_that_runs(algorithm: str, size: int) -> None:
    request = build_request(models={"actor": "llama-7b"}, sizes={"algorithm": algorithm}, gpus=8)
    assert request.workload.group_size == size and not workload_problems(request.workload)
