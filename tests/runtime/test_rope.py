"""Rotary positions: every kind of scaling and partial rotation against transformers, and where a kind does not run; and
the defaults of a config."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from plans.algorithms import algorithm_graph
from plans.errors import SpecError
from plans.families import FAMILIES
from plans.huggingface import config_from_spec, spec_from_config
from plans.rope import scaling_of, values_of
from plans.runnable import workload_problems
from plans.workload import Workload
from runtime.models.rope import amplitude, frequencies

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 2560,
    "num_attention_heads": 20,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    LLAMA3_ROPE,
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256, "truncate": False, "beta_fast": 16},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.5},
    {"rope_type": "longrope", "short_factor": [1.0 + i / 9 for i in range(64)], "long_factor": [2.0] * 64,
     "factor": 4.0, "original_max_position_embeddings": 512},
]  # fmt: skip


@pytest.mark.parametrize("rope", SCALINGS, ids=lambda rope: rope.get("rope_type", "yarn"))
def test_scaled_positions_are_those_of_transformers(rope: dict[str, Any]) -> None:
    """Frequencies, and the factor on cosines and sines; config and plan file give the record back."""
    config = LlamaConfig(**LLAMA, rope_parameters={"rope_theta": 10000.0, **rope})
    reference = LlamaRotaryEmbedding(config)
    spec = spec_from_config(LLAMA | {"rope_scaling": rope}, "x")
    torch.testing.assert_close(frequencies(spec, torch.device("cpu")), reference.inv_freq, rtol=1e-6, atol=0)
    assert amplitude(spec) == pytest.approx(reference.attention_scaling, rel=1e-12)
    assert spec_from_config(config_from_spec(spec), "x") == spec
    assert spec.rope_scaling is not None and scaling_of(json.loads(json.dumps(values_of(spec.rope_scaling)))) == (
        spec.rope_scaling
    )


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_scalings_that_depend_on_the_batch_run_where_they_do_not(kind: str) -> None:
    rope = {"factor": 2.0, "original_max_position_embeddings": 4096, "rope_type": kind}
    factors = {name: [1.5] * 64 for name in ("short_factor", "long_factor")}
    config = LLAMA | {"max_position_embeddings": 4096, "rope_scaling": rope | (factors if kind == "longrope" else {})}
    model = spec_from_config(config, "x")

    def refused(tokens: int) -> list[str]:
        work = Workload(graph=algorithm_graph("grpo"), models=dict.fromkeys(("actor", "ref", "reward"), model),
                        group_size=8, prompt_tokens=96, response_tokens=tokens)  # fmt: skip
        return [problem.message for problem in workload_problems(work)]

    assert refused(4000) == []
    assert f"{kind} scaling, which runs up to 4096 tokens, for samples of 96 + 4001" in refused(4001)[0]


def test_older_scalings_have_no_kind() -> None:
    values = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192}
    assert values_of(scaling_of(values)) == values
    with pytest.raises(SpecError, match="a yarn scaling lacks original_max_position, attention_factor"):
        scaling_of({"kind": "yarn", "factor": 2.0})
    with pytest.raises(SpecError, match="a linear scaling has no beta_fast"):
        scaling_of({"kind": "linear", "factor": 2.0, "beta_fast": 1.0})


def test_partial_rotation_of_a_family_that_has_none_is_refused() -> None:
    with pytest.raises(SpecError, match=r"partial_rotary_factor 0\.5 changes the numbers"):
        spec_from_config(LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "x")


@pytest.mark.parametrize("theta", [1.0, 10000.0])
@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_contexts_and_bases_without_a_logarithm_are_refused(kind: str, theta: float) -> None:
    rope = {"type": kind, "factor": 4.0, "original_max_position_embeddings": 64 if theta == 1.0 else 1}
    factors = {"short_factor": [1.0] * 64, "long_factor": [1.0] * 64} if kind == "longrope" else {}
    config = LLAMA | {"rope_theta": theta, "rope_scaling": rope | factors}
    if theta == 1.0 and kind == "longrope":  # needs no logarithm of its base
        assert frequencies(spec_from_config(config, "x"), torch.device("cpu")).eq(1).all()
        return
    with pytest.raises(SpecError, match="rope_theta is 1.0" if theta == 1.0 else "original_max_position is 1"):
        spec_from_config(config, "x")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_absent_keys_of_a_config_mean_what_transformers_takes(family: str) -> None:
    theirs = AutoConfig.for_model(family).to_dict()
    rope = theirs["rope_parameters"]
    theirs["rope_theta"] = rope.get("full_attention", rope)["rope_theta"]
    compared = 0
    for name, field in FAMILIES[family].model_fields.items():
        if field.is_required() or name in ("rope_parameters", "rope_scaling", "layer_types") or name not in theirs:
            continue
        ours = field.get_default()
        if ours is not None:
            compared += 1
            assert theirs[name] == ours or (name == "sliding_window" and not theirs[name]), name
    assert compared >= 5
