"""Explanations against plain costs: what is said of a plan must be true when the plan is costed that way."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from plan_cases import all_meshes
from typer.testing import CliRunner

from cost_models.engines.engine import MEGATRON
from cost_models.estimate import cost_plan
from cost_models.simulate import Durations, simulate
from planner.cli.app import app
from planner.explanation.alternatives import Where, elsewhere
from planner.explanation.binding import binding_terms, by_resource
from planner.explanation.critical import CriticalPath, critical_path
from planner.explanation.explain import SPARE, Explanation, explain
from planner.explanation.explain_text import render_explanation
from planner.explanation.kinds import kind_of
from planner.explanation.neighbourhood import moved
from planner.space.layouts import Pruned, Shape, strategies
from planner.space.limits import Limits
from planner.space.pricing import Space, build_space
from plans.algorithms import Variant, ppo
from plans.checks import check_plan
from plans.cluster import DeviceMesh, parse_mesh
from plans.codec import save_plan
from plans.library import load_cluster, load_model
from plans.plan import ExecutionPlan, PlannedCall
from plans.program import Program, StepKind, compile_program
from plans.strategy import ParallelStrategy, Recompute, parse_degrees
from plans.workload import Workload

PLACES = {
    "actor_generate": ("nodes 0-1", "d8 t2 p1", {}),
    "reward_infer": ("node 1", "d8 t1 p1", {"micro_batches": 32, "offload": True}),
    "ref_infer": ("node 0", "d8 t1 p1", {"micro_batches": 32, "offload": True}),
    "critic_infer": ("nodes 0-1", "d16 t1 p1", {"micro_batches": 16}),
    "actor_train": ("node 1", "d4 t1 p2", {"micro_batches": 32, "recompute": Recompute.FULL}),
    "critic_train": ("node 0", "d2 t1 p4", {"micro_batches": 64, "recompute": Recompute.FULL}),
}


def workload(reward_s: float | None = None) -> Workload:
    model = load_model("llama-7b")
    graph = ppo(Variant(reward_seconds_per_sample=reward_s))
    models = {role: model.with_value_head() if role in ("critic", "reward") else model for role in graph.roles}
    return Workload(graph=graph, models=models, batch_size=512, minibatches=4)


def plan_7b(**changes: tuple[str, str, dict[str, object]]) -> ExecutionPlan:
    """7B PPO on two nodes; `changes` are other places of calls."""
    cluster = load_cluster("h100-80gb-sxm", gpus=16)
    calls = []
    for call, (mesh, degrees, settings) in {**PLACES, **changes}.items():
        strategy = ParallelStrategy(**parse_degrees(degrees), **settings)  # type: ignore[arg-type]
        calls.append(PlannedCall(call=call, mesh=parse_mesh(mesh, cluster), strategy=strategy))
    plan = ExecutionPlan(workload=workload(), cluster=cluster, calls=tuple(calls))
    assert check_plan(plan) == []
    return plan


def random_program(rng: random.Random) -> tuple[Program, Durations]:
    """Random meshes and times, sometimes a lagging critic, sometimes a Python reward."""
    work = workload(0.01 if rng.random() < 0.5 else None)
    cluster = load_cluster("h100-80gb-sxm", gpus=32)
    meshes: list[DeviceMesh] = [mesh for mesh in all_meshes(cluster) if 128 % mesh.size == 0]
    calls = []
    for call in work.graph.model_calls:
        mesh = rng.choice(meshes)
        calls.append(PlannedCall(call=call.name, mesh=mesh, strategy=ParallelStrategy(dp=mesh.size)))
    if rng.random() < 0.5:
        calls = [replace(calls[-1], lag=1), *calls[:-1]]
    program = compile_program(ExecutionPlan(workload=work, cluster=cluster, calls=tuple(calls)))
    seconds = {step.name: rng.uniform(0.1, 10.0) for step in program.steps}
    return program, Durations(seconds)


@pytest.mark.parametrize("seed", range(40))
def test_path_adds_up_to_the_period_and_sets_it(seed: int) -> None:
    program, durations = random_program(random.Random(seed))
    path = critical_path(program, durations)
    period = simulate(program, durations).period_s
    assert path.seconds == pytest.approx(path.periods * period, rel=1e-6)
    at = 0.0
    for before, link in zip([path.links[-1], *path.links], path.links, strict=False):
        assert link.start_s == pytest.approx(at)
        assert link.waits_for == before.step
        at += link.seconds
    for link in path.links:
        visits = sum(other.step == link.step for other in path.links)
        longer = Durations({**durations.seconds, link.step: durations.seconds[link.step] + 1.0})
        assert simulate(program, longer).period_s >= period + visits / path.periods - 1e-6
    _names_true_reasons(program, path)


def _names_true_reasons(program: Program, path: CriticalPath) -> None:
    """GPUs are waited for where ranks are shared, data and weights along edges or after what brings them."""
    steps = {step.name: step for step in program.steps}
    edges = {(e.source, e.target, e.distance) for e in program.plan.workload.graph.edges}
    for link in path.links:
        step, other = steps[link.step], steps[link.waits_for]
        if link.wait == "gpus":
            assert set(step.ranks) & set(other.ranks)
        elif other.kind is StepKind.TRANSFER:
            assert other.consumer == link.call
        elif other.kind is StepKind.REALLOCATE:
            assert other.copy == step.copy
        elif step.kind is StepKind.TRANSFER:
            assert other.name == step.subject
        else:
            assert (other.subject, link.call, link.earlier) in edges


def test_binding_terms_add_up_to_the_period() -> None:
    cost = cost_plan(plan_7b())
    terms = binding_terms(cost, critical_path(cost.program, cost.durations))
    assert sum(term.seconds for term in terms) == pytest.approx(cost.iteration_s, rel=1e-6)
    assert sum(by_resource(terms).values()) == pytest.approx(cost.iteration_s, rel=1e-6)


def test_best_strategy_on_the_same_mesh_equals_trying_them_all() -> None:
    plan = plan_7b()
    cost = cost_plan(plan)
    now = plan.planned("reward_infer")
    costs = {}
    for strategy in strategies(
        plan.workload, "reward_infer", Shape(now.mesh.gpus, now.mesh.nodes), Pruned(), context_parallel=False
    ):
        if strategy.degrees != now.strategy.degrees:
            other = cost_plan(moved(plan, "reward_infer", (now.mesh, strategy)))
            if other.fits:
                costs[strategy] = other.iteration_s
    found = {a.where: a for a in elsewhere(cost, "reward_infer", None).best}
    assert found[Where.STRATEGY].iteration_s == pytest.approx(min(costs.values()), rel=1e-4)
    assert found[Where.STRATEGY].change_s == pytest.approx(min(costs.values()) - cost.iteration_s, abs=1e-3)
    assert Where.MESH not in found


def test_a_layout_that_lacks_memory_says_how_much() -> None:
    plan = plan_7b(actor_train=("nodes 0-1", "d8 t2 p1", {"micro_batches": 16, "recompute": Recompute.FULL}))
    gpu = replace(plan.cluster.gpu, memory_gib=cost_plan(plan).memory.peak_gib + 0.1)
    small = replace(plan, cluster=replace(plan.cluster, gpu=gpu))
    found = elsewhere(cost_plan(small), "actor_train", None)
    assert found.too_large is not None
    assert found.too_large.over_gib > 0
    assert all(found.too_large.change_s < alternative.change_s for alternative in found.best)


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    return explain(plan_7b(), MEGATRON, seconds=2.0)


def test_kinds_differ_and_are_in_order(explanation: Explanation) -> None:
    times = [kind.iteration_s for kind in explanation.kinds]
    assert len(times) >= 3
    assert times == sorted(times)
    assert len({kind.description for kind in explanation.kinds}) == len(times)
    assert sum(kind.same_kind for kind in explanation.kinds) <= 1
    assert explanation.best_found_s <= min(times) * (1 + 1e-9)
    assert all(k.ratio == pytest.approx(k.iteration_s / explanation.iteration_s) for k in explanation.kinds)


def test_more_hardware_never_costs_time(explanation: Explanation) -> None:
    assert len(explanation.upgrades) == 3
    for upgrade in explanation.upgrades:
        assert upgrade.saved_s >= 0
        assert upgrade.iteration_s == pytest.approx(explanation.best_found_s - upgrade.saved_s)
    assert explanation.upgrades[0].saved_s > 0, "half as many GPUs again must help"


def test_calls_with_spare_time_can_take_longer(explanation: Explanation) -> None:
    cost = cost_plan(plan_7b())
    for planned in plan_7b().calls:
        seconds = cost.durations.seconds
        longer = Durations({**seconds, planned.call: seconds[planned.call] + SPARE * cost.iteration_s})
        later = simulate(cost.program, longer).period_s > cost.iteration_s * (1 + 1e-6)
        assert later != (planned.call in explanation.spare)


def test_text_is_narrow_and_complete(explanation: Explanation) -> None:
    text = render_explanation(explanation)
    assert max(map(len, text.splitlines())) <= 100
    for word in ("CRITICAL PATH", "WHAT BINDS", "IDLE", "MEMORY", "ELSEWHERE", "MORE HARDWARE", "OTHER KINDS", *PLACES):
        assert word in text


def test_same_kind_for_nearly_the_same_width() -> None:
    plan = plan_7b()
    assert kind_of(plan) == kind_of(
        moved(plan, "actor_train", (plan.planned("actor_train").mesh, ParallelStrategy(dp=8)))
    )
    other = plan_7b(actor_train=("node 0", "d4 t1 p2", {"micro_batches": 32}))
    assert kind_of(plan) != kind_of(other)


def test_command_prints_one_object_for_a_hand_edited_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = plan_7b(critic_infer=("nodes 0-1", "d4 t4 p1", {"micro_batches": 128}))
    space = build_space(plan.workload, plan.cluster, MEGATRON, Limits())
    edited = plan.planned("critic_infer")
    assert isinstance(space, Space)
    assert (edited.mesh, edited.strategy) not in space.options["critic_infer"], "so slow that no search looks at it"
    save_plan(plan, path)
    result = CliRunner().invoke(app, ["explain", str(path), "--json", "--seconds", "0.5"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert sum(link["seconds"] for link in data["path"]["links"]) == pytest.approx(data["iteration_s"])
    best = {call["call"]: call["best"] for call in data["calls"]}["critic_infer"]
    assert min(a["change_s"] for a in best) < 0


def test_command_says_when_the_plan_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_plan(plan_7b(actor_train=("node 1", "d8 t1 p1", {"micro_batches": 1})), path)
    result = CliRunner().invoke(app, ["explain", str(path), "--seconds", "0.2"])
    assert result.exit_code == 1
    assert "DOES NOT FIT" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
