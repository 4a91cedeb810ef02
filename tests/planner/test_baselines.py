"""Baselines: legal plans of the described kind, priced within what physics allows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cost_models.engines.engine import MEGATRON, NamedEngine
from cost_models.estimate import PlanCost, call_cost, cost_plan
from cost_models.validation.predictions import heuristic_strategy
from planner.baselines import BASELINES, Contender, symmetric, zero3
from planner.pictures.compare import compare, render_rows
from planner.pictures.headline import PUBLISHED_HOURS, STEPS, headline_request
from planner.request import Request, build_request
from planner.search.relaxation import relax
from planner.space.limits import Limits, parse_limits
from planner.space.pricing import Space, build_space
from plans.checks import check_plan
from plans.cluster import GIB
from plans.codec import load_plan, save_plan
from plans.errors import Infeasible
from plans.graph import CallKind


@pytest.fixture(scope="module")
def published() -> Request:
    return headline_request()


@pytest.fixture(scope="module")
def contenders(published: Request) -> dict[str, Contender]:
    """Every baseline of the published case."""
    found = {}
    for name, way in BASELINES.items():
        answer = way(published.workload, published.cluster, NamedEngine("real"))
        assert isinstance(answer, Contender), answer
        found[name] = answer
    return found


def small(gpus: int, **sizes: int) -> Request:
    models = dict.fromkeys(("actor", "critic", "reward", "ref"), "llama-7b")
    return build_request(models=models, sizes=sizes, cluster="h100-80gb-sxm", gpus=gpus, gpus_per_node=None, run=None)


def test_every_baseline_is_a_legal_plan_that_fits_and_travels_in_a_file(
    contenders: dict[str, Contender], tmp_path: Path
) -> None:
    for name, contender in contenders.items():
        assert not check_plan(contender.plan), name
        assert contender.cost.fits, name
        save_plan(contender.plan, tmp_path / f"{name}.json")
        assert load_plan(tmp_path / f"{name}.json").calls == contender.plan.calls


def test_the_heuristic_is_priced_as_the_validated_row(contenders: dict[str, Contender]) -> None:
    """The published run had two micro-batches per stage in training, one in the other calls."""
    plan = contenders["real-heuristic"].plan
    for planned in plan.calls:
        role = plan.workload.graph.call(planned.call).model
        published = heuristic_strategy(planned.call, role, plan.cluster)
        generates = plan.workload.graph.call(planned.call).kind is CallKind.GENERATE
        assert planned.strategy == (replace(published, micro_batches=1) if generates else published), planned.call
    hours = contenders["real-heuristic"].cost.iteration_s * STEPS / 3600
    assert hours == pytest.approx(18.6, abs=0.05)


@pytest.mark.parametrize(
    "model, gpus, algorithm, group_size",
    [("llama-7b", 8, "ppo", 1), ("qwen3-30b-a3b", 32, "grpo", 8), ("mixtral-8x7b", 32, "ppo", 1)],
)
def test_baselines_tell_the_truth(model: str, gpus: int, algorithm: str, group_size: int) -> None:
    """Dense and with experts: what is said to fit does on every GPU, and no plan beats a bound that holds for all."""
    request = build_request(
        models={"actor": model}, sizes={"algorithm": algorithm, "group_size": group_size, "batch_size": 128}, gpus=gpus
    )
    space = build_space(request.workload, request.cluster, MEGATRON, Limits())
    assert isinstance(space, Space)
    bound_s = relax(space.problem).bound_s
    for name in ("symmetric", "real-heuristic", "verl"):
        answer = BASELINES[name](request.workload, request.cluster, MEGATRON)
        assert isinstance(answer, Contender), (name, answer)
        assert not check_plan(answer.plan), name
        cost = cost_plan(answer.plan, MEGATRON)
        assert answer.cost.fits == (answer.cost.memory.peak_bytes <= request.cluster.gpu_memory_bytes), name
        assert name == "real-heuristic" or answer.cost.fits, name
        assert not cost.fits or cost.iteration_s >= bound_s, name


def test_symmetric_obeys_the_limits_or_there_is_none() -> None:
    request = small(8, batch_size=64)
    calls = [call.name for call in request.workload.graph.model_calls]
    free = symmetric(request.workload, request.cluster, MEGATRON)
    limits = parse_limits(["actor_train.tp=8"], [], [], "70GiB", calls)
    pinned = symmetric(request.workload, request.cluster, MEGATRON, limits)
    assert isinstance(pinned, PlanCost) and isinstance(free, PlanCost)
    assert {planned.strategy.tp for planned in pinned.program.plan.calls} == {8}
    assert cost_plan(pinned.program.plan, MEGATRON).memory.peak_gib <= 70
    apart = parse_limits(["actor_train.tp=8", "ref_infer.tp=1"], [], [], "", calls)
    assert isinstance(symmetric(request.workload, request.cluster, MEGATRON, apart), Infeasible)


def test_uniform_plans_use_one_layout_of_all_gpus(contenders: dict[str, Contender]) -> None:
    for name in ("symmetric", "real-heuristic"):
        plan = contenders[name].plan
        assert {(p.mesh.size, p.strategy.degrees) for p in plan.calls} == {(128, plan.calls[0].strategy.degrees)}
    heuristic = contenders["real-heuristic"].plan
    assert heuristic.calls[0].strategy.degrees == "d1 t8 p16"
    assert {p.call for p in heuristic.calls if p.strategy.offload} == {"ref_infer", "reward_infer"}
    assert contenders["symmetric"].cost.iteration_s <= contenders["real-heuristic"].cost.iteration_s


def test_deepspeed_chat_is_data_parallel_on_all_gpus_and_generates_inside_nodes(
    contenders: dict[str, Contender],
) -> None:
    plan = contenders["deepspeed-chat"].plan
    for planned in plan.calls:
        assert planned.mesh == plan.cluster.whole
        if planned.call == "actor_generate":
            assert planned.strategy.pp == 1 and 1 < planned.strategy.tp <= 8
        else:
            assert planned.strategy.dp == 128


def test_openrlhf_groups_are_apart_and_share_as_its_readme_says(contenders: dict[str, Contender]) -> None:
    plan = contenders["openrlhf"].plan
    meshes = {p.call: p.mesh for p in plan.calls}
    assert meshes["actor_train"] == meshes["ref_infer"]
    assert meshes["critic_train"] == meshes["critic_infer"] == meshes["reward_infer"]
    groups = [meshes[call] for call in ("actor_generate", "actor_train", "critic_train")]
    assert not any(a.overlaps(b) for i, a in enumerate(groups) for b in groups[i + 1 :])
    assert groups[1].size == groups[2].size == 32
    (sync,) = [s for name, s in contenders["openrlhf"].cost.durations.seconds.items() if "reallocate" in name]
    spec = plan.workload.models["actor"]
    assert sync > 2 * spec.params / (plan.cluster.inter_node_gbps * 1e9)  # one GPU's link


def test_verl_trains_in_one_layout_and_rolls_out_in_another(contenders: dict[str, Contender]) -> None:
    plan = contenders["verl"].plan
    others = {(p.strategy.tp, p.strategy.pp) for p in plan.calls if p.call != "actor_generate"}
    assert len(others) == 1 and {p.mesh for p in plan.calls} == {plan.cluster.whole}
    assert plan.planned("actor_generate").strategy.pp == 1
    assert any("reallocate" in name for name in contenders["verl"].cost.durations.seconds)


def test_zero3_holds_shares_and_gathers_no_faster_than_the_network(contenders: dict[str, Contender]) -> None:
    plan = contenders["deepspeed-chat"].plan
    spec, cluster = plan.workload.models["ref"], plan.cluster
    sharded, whole = zero3.sharded_call(plan, "ref_infer"), call_cost(plan, "ref_infer", zero3.ENGINE)
    assert sharded.memory.terms["weights"] == pytest.approx(2 * spec.params / 128, rel=0.05)
    assert whole.memory.terms["weights"] == pytest.approx(2 * spec.params, rel=0.05)
    layer = 2 * spec.layer_params
    assert sharded.memory.terms["workspace"] - whole.memory.terms["workspace"] == pytest.approx(2 * layer)
    node_bytes_per_s = 8 * cluster.inter_node_gbps * 1e9
    from_elsewhere = spec.layers * layer * 127 / 128
    assert zero3.gather_model_s(plan, "ref_infer", 128) > from_elsewhere / node_bytes_per_s
    # 4 bytes of gradient, 4 of master and 8 of Adam for each parameter, over all ranks
    train = zero3.sharded_call(plan, "actor_train").memory.terms
    state = train["gradients"] + train["masters"] + train["optimizer"] + train["weights"]
    assert state == pytest.approx(16 * spec.params / 128, rel=0.1)


def test_estimates_against_the_published_hours(contenders: dict[str, Contender]) -> None:
    """The heuristic's engine is modelled; of the others only a well-running system is, which must be no slower."""
    hours = {name: contender.cost.iteration_s * STEPS / 3600 for name, contender in contenders.items()}
    assert hours["real-heuristic"] == pytest.approx(PUBLISHED_HOURS["real-heuristic"], rel=0.15)
    for name in ("deepspeed-chat", "openrlhf"):
        assert hours[name] < PUBLISHED_HOURS[name]


@pytest.mark.parametrize("gpus", [8, 16, 32])
def test_baselines_scale_down(gpus: int) -> None:
    request = small(gpus, batch_size=128, prompt_tokens=256, response_tokens=256)
    for name, way in BASELINES.items():
        answer = way(request.workload, request.cluster, MEGATRON)
        assert isinstance(answer, Contender), (name, answer)
        assert not check_plan(answer.plan), name
        kinds = [request.workload.graph.call(p.call).kind for p in answer.plan.calls]
        assert kinds.count(CallKind.TRAIN_STEP) == 2


def test_a_system_without_a_plan_says_why() -> None:
    request = small(8, batch_size=12, minibatches=4)
    answer = BASELINES["deepspeed-chat"](request.workload, request.cluster, MEGATRON)
    assert isinstance(answer, Infeasible) and "8 GPUs" in answer.reason
    one = small(1)
    answer = BASELINES["openrlhf"](one.workload, one.cluster, MEGATRON)
    assert isinstance(answer, Infeasible) and "3 groups" in answer.reason


def test_table_measures_against_the_first_and_says_what_is_not_modelled(contenders: dict[str, Contender]) -> None:
    order = [contenders["real-heuristic"], contenders["verl"], contenders["openrlhf"]]
    rows = compare(order, NamedEngine("real"))
    assert rows[0].ratio == 1.0 and rows[0].same_engine_s == rows[0].iteration_s
    assert rows[1].ratio == pytest.approx(order[1].cost.iteration_s / order[0].cost.iteration_s)
    assert rows[1].same_engine_s == pytest.approx(cost_plan(order[1].plan, NamedEngine("real")).iteration_s)
    assert rows[2].same_engine_s is None  # whole weights on every rank do not fit
    assert rows[2].idle > 0.25  # groups wait for each other
    text = render_rows(rows, {"other": Infeasible("too few GPUs")})
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "no plan: too few GPUs" in text and "Ray's object store" in text
    assert f"{order[1].cost.memory.peak_bytes / GIB:.1f}" in text
