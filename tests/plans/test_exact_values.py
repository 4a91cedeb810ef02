"""Values at which a formula or a rule turns, each by hand or by the definition that it comes from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from plans import yaml_text
from plans.algorithms import tensor_kind
from plans.checkpoint_files import CheckpointError, find_whole
from plans.documents import DEEPEST, BadText
from plans.errors import SpecError
from plans.graph import MOST_STALENESS, Call, CallKind, DataflowGraph
from plans.huggingface import config_from_spec, spec_from_config
from plans.lengthsfile import lengths_file
from plans.library import load_cluster
from plans.plan import ExecutionPlan
from plans.planfile import CallFile
from plans.reallocation import WAVES_IN_FLIGHT, buffer_bytes
from plans.render import render_timeline
from plans.runfile import load_run
from plans.runnable import workload_problems
from plans.timeline import Span, Timeline

SIZES: dict[str, Any] = {
    "num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
    "intermediate_size": 128, "vocab_size": 256,
}  # fmt: skip
WINDOWED, WHOLE = "sliding_attention", "full_attention"


def spec(kind: str, **keys: Any) -> Any:
    return spec_from_config({"model_type": kind, **SIZES, **keys}, kind)


@pytest.mark.parametrize(("kind", "every"), [("gemma2", 2), ("gemma3_text", 6)])
def test_every_so_many_th_layer_of_gemma_sees_everything(kind: str, every: int) -> None:
    layers = [WHOLE if i % every == every - 1 else WINDOWED for i in range(6)]
    model = spec(kind, sliding_window=8, layer_types=layers)
    assert [model.window_of(i) for i in range(6)] == [0 if layer == WHOLE else 8 for layer in layers]
    with pytest.raises(SpecError, match="layer_types"):
        spec(kind, sliding_window=8, layer_types=layers[::-1])


def test_gemma_3_without_a_window_has_one_rope_theta() -> None:
    assert spec("gemma3_text", sliding_window=None).local_rope_theta == 0.0
    assert spec("gemma3_text", sliding_window=8).local_rope_theta == 10_000.0


def test_qwen_s_first_layers_see_everything() -> None:
    layers = [WHOLE] * 4 + [WINDOWED] * 2
    model = spec("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=4, layer_types=layers)
    assert [model.window_of(i) for i in range(6)] == [0, 0, 0, 0, 8, 8]


def test_the_first_gemma_s_config_has_no_keys_of_the_later_ones() -> None:
    assert "query_pre_attn_scalar" not in config_from_spec(spec("gemma"))
    assert config_from_spec(spec("gemma2"))["query_pre_attn_scalar"] == 256


def test_yarn_s_attention_factor() -> None:
    """0.1 x mscale x ln(factor) + 1 over the same with mscale_all_dim (Peng et al. 2023, 3.4; DeepSeek-V2's config)."""

    def factor(**keys: float) -> float:
        rope = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, **keys}
        found = spec("llama", max_position_embeddings=163840, rope_scaling=rope).rope_scaling.attention_factor
        return float(found)

    assert factor() == pytest.approx(0.1 * math.log(40) + 1)
    assert factor(mscale=0.707, mscale_all_dim=1.2) == pytest.approx(
        (0.0707 * math.log(40) + 1) / (0.12 * math.log(40) + 1)
    )


def test_buffers_grow_with_what_moves_until_two_waves_fly() -> None:
    most = WAVES_IN_FLIGHT * 1000
    moved = np.array([0.0, 10.0, most, most + 1.0, 50.0 * most])
    assert buffer_bytes(moved, 1000).tolist() == [0.0, 20.0, 2.0 * most, 2.0 * most, 2.0 * most]


@pytest.mark.parametrize(("ranks", "name"), [(range(9, 10), "node 1 gpu 1"), (range(10, 12), "node 1 gpus 2-3")])
def test_a_lane_of_a_part_of_a_node(ranks: range, name: str, plan: ExecutionPlan) -> None:
    cluster = load_cluster("h100-80gb-sxm", gpus=16)
    spans = (Span(name="x", kind="call", iteration=1, start_s=0.0, end_s=1.0, ranks=tuple(ranks)),)
    timeline = Timeline(source="predicted", period_s=1.0, spans=spans)
    assert f"\n{name} " in render_timeline(timeline, cluster, plan)


def test_kinds_of_tensors_by_their_names() -> None:
    kinds = {key: tensor_kind(key) for key in ("rewards", "rewards_2", "values", "zeta", "ref_logprobs", "sequences_b")}
    assert kinds == {
        "rewards": "rewards", "rewards_2": "rewards", "values": "values", "zeta": "logprobs",
        "ref_logprobs": "logprobs", "sequences_b": "sequences",
    }  # fmt: skip


def test_a_lag_is_one_more_than_the_largest_staleness_at_most() -> None:
    words = {"call": "actor_train", "mesh": "node 0", "strategy": "d8 t1 p1"}
    assert CallFile(**words, lag=MOST_STALENESS + 1).lag == MOST_STALENESS + 1
    with pytest.raises(ValidationError, match="lag"):
        CallFile(**words, lag=MOST_STALENESS + 2)


def test_a_document_has_so_many_values_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_text, "MOST_VALUES", 5)
    assert yaml_text.parse_yaml("[1, 2, 3, 4]").data == [1, 2, 3, 4]  # a list and four numbers
    for text in ("[1, 2, 3, 4, 5]", "[1, 2, 3, 4, 5, 6, 7]"):
        with pytest.raises(BadText, match="too many values"):
            yaml_text.parse_yaml(text)


def test_lists_nest_so_deep_and_no_deeper() -> None:
    assert yaml_text.parse_yaml("[" * DEEPEST + "]" * DEEPEST).data is not None
    with pytest.raises(BadText, match="deep"):
        yaml_text.parse_yaml("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1))


def test_functions_beside_a_run_file_are_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "run.yaml").write_text("reward: mine.py:score\n")
    assert load_run(tmp_path / "run.yaml").reward == f"{tmp_path / 'mine.py'}:score"


def test_no_checkpoint_in_an_output_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        find_whole(tmp_path)


def test_a_length_below_zero_names_a_maximum_that_is_one(tmp_path: Path) -> None:
    (tmp_path / "lengths.txt").write_text("3\n-4\n")
    with pytest.raises(SpecError, match="from 0 to the maximum, 16") as error:
        lengths_file(tmp_path / "lengths.txt", prompt_tokens=8, response_tokens=16)
    assert "a maximum of 1 tokens" in str(error.value)


def test_a_graph_of_ones_own_that_generates_nothing_does_not_run(plan: ExecutionPlan) -> None:
    """Its calls are of every other kind."""
    score = Call(name="ref_infer", kind=CallKind.INFERENCE, model="ref", inputs=("prompts",), outputs=("ref_logprobs",))
    judge = Call(name="judge", kind=CallKind.FUNCTION, inputs=("ref_logprobs",), outputs=("rewards",))
    train = Call(name="actor_train", kind=CallKind.TRAIN_STEP, model="actor", inputs=("rewards",), loss="grpo")
    graph = DataflowGraph(name="mine", calls=(score, judge, train))
    models = {role: plan.workload.models[role] for role in graph.roles}
    said = [problem.message for problem in workload_problems(replace(plan.workload, graph=graph, models=models))]
    assert any("generates nothing" in message for message in said)
