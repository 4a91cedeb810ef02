"""Files of users that were written before a change of the formats still load and mean the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from cost_models.tables.table_file import load_table
from plans.checks import check_plan
from plans.codec import digest, dump_plan, load_plan, read_plan
from plans.lengths import Lengths
from plans.runfile import load_run

BEFORE = Path(__file__).parents[1] / "fixtures" / "before"


@pytest.mark.parametrize("name", ["ppo-tail", "grpo-experts", "tiny"])
def test_a_plan_loads_is_legal_and_its_estimate_is_not_stale(name: str) -> None:
    plan = load_plan(BEFORE / f"{name}.json")
    assert check_plan(plan) == []
    assert plan.estimate is not None and plan.estimate.of == digest(plan)
    assert read_plan(dump_plan(plan)) == (plan, [])


def test_a_plan_means_what_it_meant() -> None:
    tail = load_plan(BEFORE / "ppo-tail.json")
    assert tail.workload.responses == Lengths(2048, 700) and tail.workload.prompts.full
    experts = load_plan(BEFORE / "grpo-experts.json")
    assert experts.workload.graph.staleness == 1 and experts.workload.graph.call("actor_infer")
    assert experts.workload.group_size == 8 and experts.workload.models["actor"].experts == 128
    tiny = load_plan(BEFORE / "tiny.json")
    assert tiny.workload.graph.call("reward").seconds_per_sample > 0
    assert not tiny.workload.models["critic"].tied_embeddings and tiny.workload.models["actor"].tied_embeddings


def test_a_run_file_keeps_every_key() -> None:
    run = load_run(BEFORE / "run.yaml")
    assert run.weights_of("actor").endswith("tiny-llama") and run.weights_of("reward") == "random"
    assert (run.sampling.temperature, run.sampling.top_k, run.sampling.top_p) == (0.7, 50, 0.9)
    assert (run.ppo.value_clip, run.ppo.reward_clip, run.dpo.beta, run.timeout_s) == (0.3, 5.0, 0.2, 120)
    assert (run.workload.group_size, run.workload.mean_response_tokens) == (2, 9)
    assert not run.export and not run.sampling.stop_at_eos and run.data.max_prompts == 100


def test_a_cost_table_loads() -> None:
    table = load_table(BEFORE / "table.json")
    assert table.hardware == "cpu" and table.precision == "fp32"
    assert table.answer("embedding_forward", {"tp": 2.0, "tokens": 64.0}, 0.0).value == pytest.approx(0.0004515)
