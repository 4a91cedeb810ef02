"""Graphs of the algorithms, graphs of the user's own, and what an off-policy window changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import networkx as nx
import pytest

from plans.algorithms import ALGORITHMS, Variant, algorithm_graph
from plans.checks import check_plan
from plans.cluster import parse_mesh
from plans.codec import dump_plan, read_plan
from plans.errors import PlanError, SpecError
from plans.graph import Call, CallKind, DataflowGraph, Edge
from plans.graphfile import load_graph
from plans.library import load_cluster, load_model
from plans.model import ModelSpec
from plans.plan import ExecutionPlan, PlannedCall
from plans.program import StepKind, compile_program
from plans.routes import check_routes
from plans.strategy import ParallelStrategy
from plans.workload import Workload


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("variant", [Variant(), Variant(reward_seconds_per_sample=0.1, recompute_logprobs=True)])
def test_data_edges_form_a_dag(name: str, variant: Variant) -> None:
    graph = ALGORITHMS[name].graph(variant)
    assert {name for e in graph.edges for name in (e.source, e.target)} <= {call.name for call in graph.calls}
    data = nx.DiGraph([(e.source, e.target) for e in graph.edges if not e.distance])
    assert nx.is_directed_acyclic_graph(data)
    assert {e.source for e in graph.edges if e.distance} == set(graph.trainers.values())


def test_ppo_has_the_calls_and_edges_of_the_paper() -> None:
    graph = algorithm_graph("ppo")
    names = [c.name for c in graph.calls]
    assert names == ["actor_generate", "reward_infer", "ref_infer", "critic_infer", "actor_train", "critic_train"]
    versions = {(e.source, e.target) for e in graph.edges if e.distance}
    assert versions == {
        ("actor_train", "actor_generate"),
        ("actor_train", "actor_train"),
        ("critic_train", "critic_infer"),
        ("critic_train", "critic_train"),
    }
    seven = algorithm_graph("ppo", recompute_logprobs=True)
    assert len(seven.calls) == 7 and Edge("actor_infer", "actor_train") in seven.edges


def test_routes_go_from_generation_to_the_passes_of_the_actor() -> None:
    graph = algorithm_graph("ppo", recompute_logprobs=True, router_replay=True)
    assert {call.name for call in graph.calls if "routes" in call.inputs} == {"actor_infer", "actor_train"}
    assert [call.name for call in graph.calls if "routes" in call.outputs] == ["actor_generate"]
    remax = algorithm_graph("remax", router_replay=True)
    assert "routes" in remax.call("actor_train").inputs and "routes" not in remax.call("actor_greedy").outputs
    with pytest.raises(SpecError, match="dpo generates nothing whose routes could be replayed"):
        algorithm_graph("dpo", router_replay=True)


MIXTURE = ModelSpec(
    name="mixture", layers=2, hidden=8, heads=2, kv_heads=2, head_dim=4, ffn=8, vocab=64, experts=4, experts_per_token=2
)


@pytest.mark.parametrize(
    ("reader", "said"),
    [
        ("ref_infer", "`ref_infer` reads the routes of `actor`, whose experts are not those of its own model"),
        ("critic_infer", "`critic_infer` reads the routes of `actor`"),
        ("", "`actor` (dense) has no experts to choose from"),
    ],
)
def test_routes_of_other_experts_are_refused(reader: str, said: str) -> None:
    graph = algorithm_graph("ppo", reward_seconds_per_sample=0.1, router_replay=True)
    models = {"actor": MIXTURE, "ref": replace(MIXTURE, ffn=16), "critic": MIXTURE.with_value_head()}
    check_routes(graph, models)
    calls = tuple(replace(c, inputs=(*c.inputs, "routes")) if c.name == reader else c for c in graph.calls)
    dense = {} if reader else {"actor": replace(MIXTURE, name="dense", experts=0, experts_per_token=0)}
    with pytest.raises(SpecError) as error:
        check_routes(replace(graph, name="own", calls=calls), models | dense)
    assert said in error.value.message


def test_a_plan_file_says_that_routes_are_replayed() -> None:
    cluster = load_cluster("local-cpu", gpus=1, gpus_per_node=1)
    graph = algorithm_graph("grpo", reward_seconds_per_sample=0.1, router_replay=True)
    workload = Workload(graph=graph, models=dict.fromkeys(graph.roles, MIXTURE), batch_size=4, group_size=4)
    calls = [PlannedCall(call=c.name, mesh=cluster.whole, strategy=ParallelStrategy()) for c in graph.model_calls]
    plan = ExecutionPlan(workload=workload, cluster=cluster, calls=tuple(calls))
    text = dump_plan(plan)
    assert read_plan(text) == (plan, []) and '"router_replay": true' in text
    for old, new, rule, said in (
        ('"grpo"', '"sft"', "algorithm", "sft generates nothing whose routes could be replayed"),
        ('"experts": 4, "experts_per_token": 2', '"gated_mlp": true', "routes", "has no experts to choose from"),
    ):
        wrong = text.replace(old, new)
        problem = next(p for p in read_plan(wrong)[1] if p.rule == rule)
        assert said in problem.message
        assert wrong.splitlines()[problem.line - 1][problem.column - 1 :].startswith("true")


def test_a_call_before_its_input_is_refused() -> None:
    call = Call(name="x", kind=CallKind.INFERENCE, model="ref", inputs=("sequences",))
    with pytest.raises(SpecError, match="reads `sequences` before any call writes it"):
        DataflowGraph(name="odd", calls=(call,))


def test_functions_run_with_the_call_that_made_their_input(plan: ExecutionPlan) -> None:
    graph = algorithm_graph("ppo", reward_seconds_per_sample=0.5)
    models = {role: plan.workload.models[role] for role in graph.roles}
    calls = tuple(c for c in plan.calls if c.call != "reward_infer")
    edited = replace(plan, workload=replace(plan.workload, graph=graph, models=models), calls=calls)
    assert check_plan(edited) == []
    steps = compile_program(edited).steps
    (function,) = [s for s in steps if s.kind is StepKind.FUNCTION]
    assert function.subject == "reward" and function.ranks == tuple(edited.ranks("actor_generate"))
    again, problems = read_plan(dump_plan(edited))
    assert problems == [] and again == edited


def test_a_copy_does_not_outlive_the_training_of_its_role() -> None:
    """Log-probabilities after the training call of the iteration before are those of its new weights."""
    cluster = load_cluster("a100-80gb", gpus=2, gpus_per_node=2)
    graph = algorithm_graph("grpo", recompute_logprobs=True, staleness=1, reward_seconds_per_sample=1e-3)
    spec = load_model("llama-7b")
    workload = Workload(graph=graph, models={"actor": spec, "ref": spec}, group_size=2, minibatches=1)
    places = {"actor_generate": (0, 0), "ref_infer": (0, 0), "actor_train": (1, 1), "actor_infer": (0, 0)}
    calls = tuple(
        PlannedCall(call=name, mesh=parse_mesh(f"node 0 gpu {gpu}", cluster), strategy=ParallelStrategy(), lag=lag)
        for name, (gpu, lag) in places.items()
    )
    plan = ExecutionPlan(workload=workload, cluster=cluster, calls=calls)
    assert check_plan(plan) == []
    steps = [(s.kind, s.subject) for s in compile_program(plan).steps if s.copy.startswith("actor@")]
    trained = steps.index((StepKind.CALL, "actor_train"))
    assert steps.index((StepKind.RELEASE, "actor_generate")) < trained
    assert trained < steps.index((StepKind.REALLOCATE, "actor_infer")) < steps.index((StepKind.CALL, "actor_infer"))


def test_own_graph_from_yaml_round_trips(plan: ExecutionPlan, tmp_path: Path) -> None:
    path = tmp_path / "graph.yaml"
    path.write_text(
        "name: best-of-n\n"
        "calls:\n"
        "- {name: actor_generate, kind: generate, model: actor, inputs: [prompts], outputs: [sequences]}\n"
        "- {name: reward_infer, kind: inference, model: reward, inputs: [sequences], outputs: [rewards]}\n"
        "- {name: actor_train, kind: train_step, model: actor, inputs: [sequences, rewards]}\n"
    )
    graph = load_graph(path)
    models = {role: plan.workload.models[role] for role in graph.roles}
    calls = tuple(c for c in plan.calls if c.call in {x.name for x in graph.calls})
    own = replace(plan, workload=replace(plan.workload, graph=graph, models=models), calls=calls)
    again, problems = read_plan(dump_plan(own))
    assert problems == [] and again == own
    path.write_text("name: ppo\ncalls: [{name: a, kind: generate, model: actor}]\n")
    with pytest.raises(SpecError, match="built-in"):
        load_graph(path)
    path.write_text("name: x\ncalls: [{name: a, kind: fly}]\n")
    with pytest.raises(SpecError, match=r"calls\.0\.kind"):
        load_graph(path)


GENERATE = "- {name: g, kind: generate, model: actor, inputs: [prompts], outputs: [sequences]}\n"


@pytest.mark.parametrize(("calls", "words", "hint"), [
    ("[]", ":2:8: calls is a list; it must have a length of at least 1", "1"),
    ("\n- {name: f, kind: function, inputs: [prompts], outputs: [x]}\n" + GENERATE,
     ":3:3: function `f` must read first what a call before it writes", "after the call"),
    ("\n" + GENERATE + "- {name: f, kind: function, outputs: [x]}\n", ":4:3: function `f` must read", "[sequences]"),
    ("\n- {name: '', kind: generate, model: actor}\n", ':3:10: calls.0.name is ""; a name has', "a_name"),
    ("\n- {name: g, kind: generate}\n", ":3:3: call `g`: a function call has no model", "model: actor"),
    ("\n" + GENERATE + GENERATE, ":4:3: the name `g` is used twice", "`g_2`"),
    ("\n" + GENERATE + "- {name: t, kind: train_step, model: actor, inputs: [sequence]}\n",
     ":4:3: call `t` reads `sequence` before any call writes it", "`sequences`"),
    ("\n" + GENERATE + "- {name: h, kind: generate, model: ref, inputs: [prompts], outputs: [sequences]}\n",
     ":4:3: call `h` writes `sequences`, which call `g` writes", "`sequences_2`"),
    ("\n" + GENERATE + "- {name: f, kind: function, inputs: [sequences], seconds_per_sample: .nan}\n",
     ":4:70: calls.1.seconds_per_sample is NaN", "finite"),
    ("\n" + "- {name: t, kind: train_step, model: actor}\n- {name: u, kind: train_step, model: actor}\n",
     ":4:3: role `actor` is trained twice", "one train_step"),
    ("{a: 1}", ":2:8: calls is an object; it must be a list", "[...]"),
    ("[", ":3:1: not YAML", "indent"),
])  # fmt: skip
def test_own_graphs_that_are_none(calls: str, words: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "graph.yaml"
    path.write_text(f"name: mine\ncalls: {calls}\n")
    with pytest.raises(SpecError) as raised:
        load_graph(path)
    message, _, advice = str(raised.value).partition("\n  hint: ")
    assert message.startswith(f"{path}{words}") and hint in advice, str(raised.value)


def test_a_graph_in_a_plan_is_located(plan: ExecutionPlan) -> None:
    graph = {"name": "mine", "calls": [{"name": "f", "kind": "function", "inputs": ["prompts"]}]}
    text = dump_plan(plan).replace('"batch_size"', f'"graph": {json.dumps(graph)}, "batch_size"', 1)
    again, problems = read_plan(text)
    assert again is None and [p.rule for p in problems] == ["graph", "graph"]
    assert all(text.splitlines()[p.line - 1][p.column - 1 :].startswith('{"name": "f"') for p in problems)


def test_staleness_lets_training_lag(plan: ExecutionPlan) -> None:
    late: tuple[PlannedCall, ...] = tuple(replace(c, lag=int(c.call != "actor_generate")) for c in plan.calls)
    assert {p.rule for p in check_plan(replace(plan, calls=late))} == {"order"}
    stale = replace(plan.workload, graph=replace(plan.workload.graph, staleness=1))
    again = replace(plan, workload=stale, calls=late)
    assert check_plan(again) == []
    read, problems = read_plan(dump_plan(again))
    assert problems == [] and read == again


def test_stale_weights_are_exactly_as_old_as_the_graph_says(plan: ExecutionPlan) -> None:
    """Lags by which generation would read newer weights, or older ones, are refused by the rule and by the program."""
    graph = replace(plan.workload.graph, staleness=1)
    stale = replace(plan, workload=replace(plan.workload, graph=graph))

    def lagging(lag: int) -> ExecutionPlan:
        return replace(stale, calls=tuple(replace(c, lag=lag * (c.call == "actor_train")) for c in stale.calls))

    (early,) = check_plan(lagging(0))
    assert early.rule == "lag" and "newer weights than `actor_generate` of the iteration after" in early.message
    assert early.hint == "lag 1 for `actor_train`"
    assert check_plan(lagging(1)) == [] and graph.first_lags["actor_train"] == 1
    said = {0: "after 1 trainings; its graph says after 0", 3: "after 0 trainings; its graph says after 1"}
    for lag, words in said.items():
        with pytest.raises(PlanError, match=words):
            compile_program(lagging(lag))
