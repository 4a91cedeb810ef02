"""The simulation against a replay that knows only the rules: one step at a time per rank, inputs before calls."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from plan_cases import all_meshes

from cost_models.simulate import Durations, latency_s, simulate
from plans.algorithms import Variant, algorithm_graph, ppo
from plans.checks import check_plan
from plans.cluster import ClusterSpec, DeviceMesh
from plans.library import load_cluster, load_model
from plans.plan import ExecutionPlan, PlannedCall
from plans.program import Program, StepKind, compile_program
from plans.strategy import ParallelStrategy
from plans.workload import Workload


def workload(function_reward: bool) -> Workload:
    model = load_model("llama-7b")
    graph = ppo(Variant(reward_seconds_per_sample=0.01 if function_reward else None))
    models = {role: model.with_value_head() if role in ("critic", "reward") else model for role in graph.roles}
    return Workload(graph=graph, models=models, batch_size=512, minibatches=4)


def random_plan(rng: random.Random, cluster: ClusterSpec, function_reward: bool) -> ExecutionPlan:
    """Random meshes, with the training calls late in the order and sometimes a lagging critic."""
    work = workload(function_reward)
    meshes = [mesh for mesh in all_meshes(cluster) if 128 % mesh.size == 0]
    planned = [
        PlannedCall(call=call.name, mesh=mesh, strategy=ParallelStrategy(dp=mesh.size))
        for call in work.graph.model_calls
        for mesh in [rng.choice(meshes)]
    ]
    plan = ExecutionPlan(workload=work, cluster=cluster, calls=tuple(planned))
    if rng.random() < 0.5:
        late = replace(planned[-1], lag=1)
        plan = replace(plan, calls=(late, *planned[:-1]))
    assert check_plan(plan) == []
    return plan


def replay(program: Program, seconds: dict[str, float], iterations: int) -> list[float]:
    """End of every iteration's last call by the plain rules, each step placed after all it must follow."""
    free: dict[int, float] = {}
    done: dict[tuple[str, int], float] = {}
    arrive: dict[tuple[str, int], float] = {}
    graph = program.plan.workload.graph
    for step, t in program.unrolled(iterations):
        length = seconds.get(step.name, 0.0)
        if step.kind is StepKind.TRANSFER:
            arrive[step.consumer, t] = max(arrive.get((step.consumer, t), 0.0), done[step.subject, t] + length)
            continue
        if step.kind not in (StepKind.CALL, StepKind.FUNCTION, StepKind.REALLOCATE):
            continue
        wait = [free.get(rank, 0.0) for rank in step.ranks]
        for edge in graph.edges:
            needs_data = step.kind is not StepKind.REALLOCATE or edge.distance
            if edge.target == step.subject and needs_data and t >= edge.distance:
                wait.append(done[edge.source, t - edge.distance])
        if step.kind is not StepKind.REALLOCATE:
            wait.append(arrive.get((step.subject, t), 0.0))
        end = max(wait) + length
        free |= dict.fromkeys(step.ranks, end)
        if step.kind is not StepKind.REALLOCATE:
            done[step.subject, t] = end
    return [max(end for (_, t), end in done.items() if t == i) for i in range(iterations)]


@pytest.mark.parametrize("seed", range(25))
def test_period_and_latency_equal_a_plain_replay(seed: int) -> None:
    rng = random.Random(seed)
    cluster = load_cluster("h100-80gb-sxm", gpus=32)
    program = compile_program(random_plan(rng, cluster, function_reward=seed % 2 == 0))
    seconds = {step.name: rng.uniform(0.1, 10.0) for step in program.steps}
    for step in program.steps:
        if step.kind is StepKind.TRANSFER:
            seconds[step.name] *= 0.01
    timeline = simulate(program, Durations(seconds))
    ends = replay(program, seconds, 60)
    assert timeline.period_s == pytest.approx((ends[-1] - ends[19]) / 40, rel=1e-6)
    assert latency_s(program, Durations(seconds)) == pytest.approx(replay(program, seconds, 1)[0])
    for a in timeline.spans:
        for b in timeline.spans:
            if a is not b and a.kind != "transfer" and b.kind != "transfer" and set(a.ranks) & set(b.ranks):
                assert a.end_s <= b.start_s + 1e-9 or b.end_s <= a.start_s + 1e-9


def test_one_mesh_for_all_is_the_sum_of_the_calls() -> None:
    cluster = load_cluster("h100-80gb-sxm", gpus=8)
    work = workload(False)
    calls = tuple(
        PlannedCall(call=c.name, mesh=cluster.whole, strategy=ParallelStrategy(dp=8)) for c in work.graph.model_calls
    )
    program = compile_program(ExecutionPlan(workload=work, cluster=cluster, calls=calls))
    assert [s.kind for s in program.steps if s.kind is StepKind.REALLOCATE] == []
    seconds = {c.call: float(i + 1) for i, c in enumerate(calls)}
    timeline = simulate(program, Durations(seconds))
    assert timeline.period_s == pytest.approx(21.0)
    assert latency_s(program, Durations(seconds)) == pytest.approx(21.0)


def test_disjoint_meshes_run_at_once() -> None:
    cluster = load_cluster("h100-80gb-sxm", gpus=16)
    work = workload(False)
    left = DeviceMesh(first_node=0, nodes=1, first_gpu=0, gpus=8)
    right = DeviceMesh(first_node=1, nodes=1, first_gpu=0, gpus=8)
    place = {"actor_generate": left, "actor_train": left, "ref_infer": left}
    calls = tuple(
        PlannedCall(call=c.name, mesh=place.get(c.name, right), strategy=ParallelStrategy(dp=8))
        for c in work.graph.model_calls
    )
    program = compile_program(ExecutionPlan(workload=work, cluster=cluster, calls=calls))
    seconds = {c.call: 2.0 for c in calls}
    # generate 2, then {ref} beside {reward, critic}: 4, then both trainings at once: 2.
    assert latency_s(program, Durations(seconds)) == pytest.approx(8.0)


def test_generation_that_runs_ahead_goes_by_turns() -> None:
    """Generating, scoring and training take 3 s each on meshes of their own, and generation reads the weights of two
    iterations before: it starts at 0, 3, 9, 12, 18, ..., two iterations in 9 s."""
    model, graph = load_model("llama-7b"), algorithm_graph("grpo", staleness=1)
    work = Workload(graph=graph, models=dict.fromkeys(graph.roles, model), batch_size=512, minibatches=4)
    calls = tuple(
        PlannedCall(
            call=call.name, mesh=DeviceMesh(first_node=0, nodes=1, first_gpu=gpu, gpus=1), strategy=ParallelStrategy(),
            lag=int(call.name == "actor_train"),
        )
        for gpu, call in enumerate(graph.model_calls)
    )  # fmt: skip
    plan = ExecutionPlan(workload=work, cluster=load_cluster("h100-80gb-sxm", gpus=4, gpus_per_node=4), calls=calls)
    assert check_plan(plan) == []
    seconds = {"actor_generate": 3.0, "reward_infer": 3.0, "ref_infer": 1.0, "actor_train": 3.0}
    assert simulate(compile_program(plan), Durations(seconds)).period_s == pytest.approx(4.5)
