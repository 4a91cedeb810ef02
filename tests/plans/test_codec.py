"""The plan file: exact round trip, and one located, numbered, mendable message for every typical mistake."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from plans.checks import check_plan, divisors
from plans.codec import BadPlan, dump_plan, is_stale, load_plan, read_plan, save_plan, sealed
from plans.documents import locate
from plans.errors import RealplanError
from plans.library import load_cluster
from plans.model import ModelSpec
from plans.plan import Estimate, ExecutionPlan
from plans.planfile import CallFile, ClusterFile, json_schema
from plans.problems import Problem, value_problem
from plans.workload import Workload


def problems_of(text: str) -> list[Problem]:
    plan, problems = read_plan(text)
    return problems if plan is None else locate(text, check_plan(plan))


def test_round_trip_is_exact(plan: ExecutionPlan, tmp_path: Path) -> None:
    assert check_plan(plan) == []
    text = dump_plan(plan)
    again, problems = read_plan(text)
    assert problems == [] and again == plan
    assert again is not None and dump_plan(again) == text
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert max(len(line) for line in text.splitlines()) <= 200


def test_round_trip_of_unnamed_models_and_clusters(plan: ExecutionPlan) -> None:
    spec = ModelSpec(
        name="mine", layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=512, qkv_bias=True
    )
    models = {role: spec.with_value_head() if role in ("critic", "reward") else spec for role in plan.workload.models}
    workload = replace(plan.workload, models=models)
    cluster = replace(load_cluster("a100-80gb", gpus=128), inter_node_gbps=12.5)
    odd = replace(plan, workload=workload, cluster=replace(cluster, gpu=replace(cluster.gpu, memory_gib=70.0)))
    again, problems = read_plan(dump_plan(odd))
    assert problems == [] and again == odd


def test_comments_are_allowed_and_positions_stay(plan: ExecutionPlan) -> None:
    text = dump_plan(plan).replace('"calls": [', '"calls": [ // run order\n    /* two\n lines */')
    assert problems_of(text) == []
    (problem,) = problems_of(text.replace('"nodes 8-15"', '"nodes 8-16"', 1))
    line = text.splitlines()[problem.line - 1]
    assert "ref_infer" in line and line[problem.column - 1 :].startswith('"nodes 8-15"')


def test_an_estimate_belongs_to_its_plan_and_keeps_its_figures(plan: ExecutionPlan) -> None:
    figures = {"iteration_s": 9.5, "latency_s": 12.0, "calls_s": {"actor_train": 3.0}, "peak_gib": 70.0}
    bare = Estimate(**figures, peak_at="actor_train, rank 0", host_gib=1.0, engine="e", of="")  # type: ignore[arg-type]
    sealed_plan = plan.with_estimate(sealed(plan, bare))
    assert not is_stale(plan) and not is_stale(sealed_plan)
    again, _ = read_plan(dump_plan(sealed_plan))
    assert again is not None and not is_stale(again)
    assert not is_stale(replace(sealed_plan, notes="x", run="ppo.yaml", provenance={"a": 1}))
    assert is_stale(replace(sealed_plan, calls=(*plan.calls[1:], plan.calls[0])))
    for old, new in (('"iteration_s": 9.5', '"iteration_s": 0.0001'), ('"actor_train": 3.0', '"actor_train": 2.0')):
        edited, _ = read_plan(dump_plan(sealed_plan).replace(old, new))
        assert edited is not None and is_stale(edited)
    edited, problems = read_plan(dump_plan(sealed_plan).replace('"iteration_s": 9.5', '"iteration_s": NaN'))
    assert edited is None and "estimate.iteration_s is NaN; it must be a finite number" in problems[0].message


def test_problems_are_bounded(plan: ExecutionPlan) -> None:
    lines = ",".join(f'"x{i}": 1' for i in range(30_000))
    problems = problems_of(dump_plan(plan).replace('"format"', lines + ', "format"', 1))
    assert len(problems) == 20 and all(problem.line == 2 for problem in problems)
    assert "unknown key `x0`" in problems[0].message and "more problems" in problems[-1].message
    twice = problems_of(dump_plan(plan).replace('"batch_size": 512', ",".join(['"batch_size": 512'] * 30_000), 1))
    assert [p.rule for p in twice] == ["duplicate-key"] and twice[0].line > 1


# (rule, old text, new text, where the caret is, a legal value that the hint names)
MISTAKES = [
    ("json", '"calls": [', '"calls": ', None, "comma"),
    ("unknown-key", '"mesh": "nodes 0-15"', '"mash": "nodes 0-15"', '"nodes 0-15"', "`mesh`"),
    ("missing-key", '"mesh": "nodes 0-15", ', "", '{"call": "actor_generate"', "mesh"),
    ("call", '"actor_generate"', '"actor_generat"', '"actor_generat"', "`actor_generate`"),
    ("call-missing", '    {"call": "ref_infer"', '    // {"call": "ref_infer"', "[", "ref_infer"),
    ("call-twice", '"ref_infer"', '"critic_infer"', '{"call": "critic_infer"', "delete"),
    ("value", '"batch_size": 512', '"batch_size": "many"', '"many"', "whole number"),
    ("model", '"actor": "llama2-70b"', '"actor": "llama2-70c"', '"llama2-70c"', "`llama2-70b`"),
    ("cluster", '"h100-80gb-sxm"', '"h100"', '"h100"', "`h100-80gb-sxm`"),
    ("workload", '"minibatches": 4', '"minibatches": 7', "7", "[1, 2, 4, 8, 16]"),
    ("mesh", '"nodes 0-15"', '"all nodes"', '"all nodes"', "`nodes 0-3`"),
    ("mesh", '"nodes 0-15"', '"nodes 0-16"', '"nodes 0-16"', "`nodes 0-15`"),
    ("mesh", '"nodes 0-15"', '"node 3 gpus 0-2"', '"node 3 gpus 0-2"', "2 GPUs or 4"),
    ("mesh", '"nodes 0-15"', '"node 3 gpus 2-5"', '"node 3 gpus 2-5"', "`node 3 gpus 0-3`"),
    ("strategy", '"d16 t8 p1"', '"16x8x1"', '"16x8x1"', "letters"),
    ("mesh-size", '"d16 t8 p1"', '"d8 t8 p1"', '"d8 t8 p1"', "d16 t8 p1"),
    ("kv-heads", '"d16 t8 p1"', '"d8 t16 p1"', '"d8 t16 p1"', "[1, 2, 4, 8]"),
    ("batch", '"micro_batches": 16', '"micro_batches": 24', "24", "micro_batches"),
    ("kind", '"d16 t8 p1"', '"d16 t8 p1", "recompute": "full"', '"full"', "leave out `recompute`"),
    ("value", '"recompute": "selective"', '"recompute": "some"', '"some"', "'none', 'selective' or 'full'"),
    ("duplicate-key", '"minibatches": 4', '"minibatches": 4, "minibatches": 4', None, "keep one"),
]


@pytest.mark.parametrize(
    ("rule", "old", "new", "caret", "hint"), MISTAKES, ids=[f"{m[0]}-{m[2]}"[:40] for m in MISTAKES]
)
def test_mistakes_are_located_and_mendable(
    plan: ExecutionPlan, rule: str, old: str, new: str, caret: str | None, hint: str
) -> None:
    text = dump_plan(plan)
    assert old in text
    wrong = text.replace(old, new, 1)
    found = [p for p in problems_of(wrong) if p.rule == rule]
    assert found, problems_of(wrong)
    problem = found[0]
    assert problem.line > 0 and problem.column > 0
    assert hint in problem.hint, problem.hint
    if caret:
        line = wrong.splitlines()[problem.line - 1]
        assert line[problem.column - 1 :].startswith(caret), line[problem.column - 1 :]
    assert problem.text("plan.json").startswith(f"plan.json:{problem.line}:{problem.column}: ")


def test_layers_that_do_not_divide(plan: ExecutionPlan) -> None:
    uneven = dump_plan(plan).replace('"nodes 0-15", "strategy": "d16 t8 p1"', '"nodes 0-2", "strategy": "d1 t8 p3"', 1)
    assert problems_of(uneven) == []
    wrong = uneven.replace("d2 t8 p4", "d2 t8 p4 v3")
    rules = {p.rule: p for p in problems_of(wrong)}
    assert "80 layers of llama2-70b do not divide into pp 4 x vpp 3 chunks" in rules["layers"].message
    assert "pp x vpp 10" in rules["layers"].hint


def test_order_and_lag(plan: ExecutionPlan) -> None:
    train_first = replace(plan, calls=(plan.calls[-1], *plan.calls[:-1]))
    assert {p.rule for p in check_plan(train_first)} == {"order"}
    lagged = tuple(replace(c, lag=int(c.call == "critic_train")) for c in plan.calls)
    late = check_plan(replace(plan, calls=lagged))
    assert [p.rule for p in late] == ["order"] and "critic_train" in late[0].message
    legal = (lagged[-1], *lagged[:-1])
    assert check_plan(replace(plan, calls=legal)) == []


def test_a_bad_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(RealplanError, match="cannot read plan"):
        load_plan(tmp_path / "none.json")
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RealplanError, match="UTF-8"):
        load_plan(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(BadPlan):
        load_plan(tmp_path / "list.json")


def test_schema_lists_every_key() -> None:
    schema = json.dumps(json_schema())
    for key in ("micro_batches", "inter_node_gbps", "response_tokens", "$schema", "rope_theta"):
        assert f'"{key}"' in schema


def test_workload_arithmetic(plan: ExecutionPlan) -> None:
    workload: Workload = replace(plan.workload, group_size=4)
    assert workload.samples == 2048
    assert workload.samples_per_step("actor_train") == 512
    assert workload.samples_per_step("ref_infer") == 2048


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"response_tokens": -4}, "response_tokens is -4; it must be at least 0"),
        ({"response_tokens": 10**30}, "it can be at most 10,000,000"),
        ({"batch_size": 10**5000}, "batch_size is a number of some 5000 digits; it can be at most 1,000,000"),
        ({"batch_size": 2000, "group_size": 1000}, "2,000,000 samples"),
        ({"mean_response_tokens": 1025}, "mean_response_tokens 1025 is above response_tokens 1024"),
    ],
)
def test_sizes_of_a_workload_have_bounds(plan: ExecutionPlan, sizes: dict[str, int], words: str) -> None:
    with pytest.raises(RealplanError, match=re.escape(words)):
        replace(plan.workload, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["inter_node_gbps", "host_memory_gib"])
@pytest.mark.parametrize("value", [0.0, -1.0, 1e-300, 1e300, float("inf"), float("nan")])
def test_speeds_and_sizes_of_a_cluster_have_bounds(plan: ExecutionPlan, field: str, value: float) -> None:
    with pytest.raises(RealplanError, match=f"{field} is {re.escape(str(value))}; it must be a number from"):
        replace(plan.cluster, **{field: value})  # type: ignore[arg-type]
    with pytest.raises(RealplanError, match=r"gpu `h100-80gb-sxm`: hbm_gbps"):
        replace(plan.cluster.gpu, hbm_gbps=value)


def test_a_cluster_has_a_largest_size(plan: ExecutionPlan) -> None:
    assert replace(plan.cluster, nodes=8192).size == 65536
    with pytest.raises(RealplanError, match="at most 65,536 GPUs"):
        replace(plan.cluster, nodes=10**12)


@pytest.mark.parametrize(
    ("value", "message", "hint"),
    [
        ({"micro_batches": 0}, "micro_batches is 0; it must be at least 1", '"micro_batches": 1'),
        ({"lag": -1}, "lag is -1; it must be at least 0", '"lag": 0'),
        ({"lag": 66}, "lag is 66; it must be at most 65", '"lag": 65'),
        ({"waves": 10**400}, "waves is a number of some 400 digits; it must be at most 1,000,000", '"waves": 1000000'),
        ({"groups": 0.5}, "groups is 0.5; it must be a whole number", '"groups": 1'),
        ({"offload": "x" * 300}, 'offload is "xxxxxxxxxxxxxxxxxxxxxxx...xxxxxxx"; it must be true or false', "true"),
        ({"mesh": [1]}, "mesh is a list; it must be a text in quotes", '"mesh": "..."'),
        ({"recompute": "some"}, 'recompute is "some", which is unknown', "'none', 'selective' or 'full'"),
    ],
)
def test_wrong_values_name_their_rule_and_a_legal_one(value: dict[str, object], message: str, hint: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CallFile.model_validate({"call": "actor_train", "mesh": "node 0", "strategy": "d8 t1 p1"} | value)
    (detail,) = caught.value.errors()
    problem = value_problem(str(detail["loc"][-1]), detail, detail["loc"])
    assert problem.message == message
    assert hint in problem.hint


def test_numbers_of_a_cluster_file_are_finite_and_positive() -> None:
    data = {"nodes": 10**12, "gpus_per_node": 8, "gpu": "cpu", "inter_node_gbps": float("nan"), "host_memory_gib": -3}
    with pytest.raises(ValidationError) as caught:
        ClusterFile.model_validate(data)
    found = [value_problem(str(d["loc"][-1]), d, d["loc"]).message for d in caught.value.errors()]
    assert found == [
        "nodes is 1000000000000; it must be at most 65,536",
        "inter_node_gbps is NaN; it must be a finite number",
        "host_memory_gib is -3; it must be above 0",
    ]


@pytest.mark.parametrize("number", [1, 2, 12, 36, 97, 1024])
def test_divisors_ascend(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
