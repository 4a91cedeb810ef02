"""Adapters in the words of plans: which parameters there are, how tp cuts them, keys of files, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from plan_cases import CRITIC_FREE, tiny_plan, tiny_run

from planner.request import build_request
from plans.codec import digest, dump_plan, read_plan
from plans.errors import SpecError
from plans.layout import model_units, trained_units
from plans.library import load_model
from plans.lora import Lora
from plans.model import ModelSpec
from plans.render import render_plan
from plans.run_checks import check_run
from plans.runfile import RunFileError

SPEC = ModelSpec(name="tiny", layers=2, hidden=8, heads=4, kv_heads=2, head_dim=4, ffn=12, vocab=120, qkv_bias=True)
ADAPTED = replace(SPEC, lora=Lora(3, targets=("linear_fc1", "linear_proj", "linear_qkv")))
PLAN = tiny_plan(2, "d2 t1 p1", algorithm="grpo", order=CRITIC_FREE, group_size=2, lora=Lora(4, 6.0))


def test_a_pair_stands_before_each_target_cut_as_its_weight() -> None:
    block = {unit.name: unit for unit in model_units(ADAPTED)}["layer.1"]
    at = "decoder.layers.1"
    assert [(p.name.removeprefix(f"{at}."), p.shape, p.axis, p.blocks, p.frozen) for p in block.parameters] == [
        ("input_layernorm.weight", (8,), None, 1, True),
        ("self_attention.linear_qkv.lora_a", (3, 8), None, 1, False),
        ("self_attention.linear_qkv.lora_b", (32, 3), 0, 1, False),
        ("self_attention.linear_qkv.weight", (32, 8), 0, 1, True),
        ("self_attention.linear_qkv.bias", (32,), 0, 1, True),
        ("self_attention.linear_proj.lora_a", (3, 16), 1, 1, False),
        ("self_attention.linear_proj.lora_b", (8, 3), None, 1, False),
        ("self_attention.linear_proj.weight", (8, 16), 1, 1, True),
        ("pre_mlp_layernorm.weight", (8,), None, 1, True),
        ("mlp.linear_fc1.lora_a", (3, 8), None, 1, False),
        ("mlp.linear_fc1.lora_b", (24, 3), 0, 2, False),
        ("mlp.linear_fc1.weight", (24, 8), 0, 2, True),
        ("mlp.linear_fc2.weight", (8, 12), 1, 1, True),
    ]
    assert [unit.name for unit in trained_units(ADAPTED)] == ["layer.0", "layer.1"]
    assert trained_units(SPEC) == model_units(SPEC) == model_units(ADAPTED.base)


def test_plans_keep_adapters_and_those_without_are_as_before() -> None:
    text = dump_plan(PLAN)
    assert json.loads(text)["workload"]["lora"]["rank"] == 4
    plan, problems = read_plan(text)
    assert plan == PLAN and not problems
    assert "actor trained through LoRA of rank 4, alpha 6\n" in render_plan(PLAN)
    without = tiny_plan(2, "d2 t1 p1", algorithm="grpo", order=CRITIC_FREE, group_size=2)
    assert "lora" not in dump_plan(without) and digest(without) != digest(PLAN)
    short = json.loads(text)
    short["workload"]["lora"] = {"rank": 4}
    plan, problems = read_plan(json.dumps(short))
    assert plan is not None and plan.workload.lora == Lora(4, 8.0) and plan.workload.models["ref"].lora is None


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rank": 0}, "workload.lora.rank is 0; it must be at least 1"),
        ({"rank": 4097}, "at most 4,096"),
        ({"rank": 4, "targets": ["linear_fc3"]}, "linear_fc3"),
        ({"rank": 4, "targets": ["linear_fc1", "linear_fc1"]}, "a target twice"),
        ({"rank": 4, "targets": []}, "at least 1"),
        ({"rank": 2048}, "rank 2048 is more than the hidden width"),
        ({"rank": 4, "alpha": 0}, "above 0"),
        ({"rank": 4, "dropout": 0.1}, "unknown key `workload.lora.dropout`"),
    ],
)
def test_refused_keys(keys: dict[str, object], said: str) -> None:
    data = json.loads(dump_plan(PLAN))
    data["workload"]["lora"] = keys
    plan, (problem,) = read_plan(json.dumps(data))
    assert plan is None and said in problem.message and problem.hint and problem.line


def test_models_that_take_no_adapters() -> None:
    with pytest.raises(SpecError, match="has experts"):
        replace(load_model("qwen3-30b-a3b"), lora=Lora(8))
    with pytest.raises(SpecError, match="latent attention"):
        replace(SPEC, kv_rank=4, rotary_dim=2, lora=Lora(2))
    with pytest.raises(SpecError, match="value head"):
        replace(SPEC.with_value_head(), lora=Lora(2))
    with pytest.raises(SpecError, match="`reward-modelling` trains no `actor`"):
        build_request(models={"actor": "llama-7b"}, sizes={"algorithm": "reward-modelling"}, lora=Lora(8))
    assert ADAPTED.with_value_head().lora is None


def test_a_reference_is_the_base_and_cannot_follow(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, reference={"every": 2})
    with pytest.raises(RunFileError, match="trained through adapters, whose base `ref` is"):
        check_run(PLAN, run)


def test_a_run_file_has_the_same_key(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("workload:\n  models: {actor: llama-7b}\n  lora: {rank: 16, alpha: 32, targets: [linear_qkv]}\n")
    assert build_request(models={}, run=run).workload.lora == Lora(16, 32, ("linear_qkv",))
    assert build_request(models={}, run=run, lora=Lora(8)).workload.lora == Lora(8)
