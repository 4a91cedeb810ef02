"""A `config.json` is applied whole, or refused by the name, place and rule of the key that would change the numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from plans.errors import SpecError
from plans.families import FAMILIES
from plans.huggingface import check_runs, config_from_spec, router_aux_loss_coef, spec_from_config, spec_from_folder
from plans.library import load_model
from plans.rope import LongRopeScaling

SIZES = {
    "num_hidden_layers": 36,
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151936,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    **SIZES,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-06,
}
LLAMA = {"model_type": "llama", **SIZES}
QWEN3_MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def refusal(config: dict[str, Any], folder: Path) -> tuple[str, str, int, int]:
    """Message and hint of a config that must be refused, with the line and column they name."""
    path = folder / "config.json"
    path.write_text(json.dumps(config, indent=1))
    with pytest.raises(SpecError) as raised:
        spec_from_folder(folder)
    message, _, hint = str(raised.value).partition("\n  hint: ")
    place, line, column, words = message.split(":", 3)
    assert place == str(path)
    return words, hint, int(line), int(column)


def test_published_sizes() -> None:
    assert spec_from_config(QWEN3, "qwen3-4b").params == pytest.approx(4.02e9, rel=0.003)
    moe = spec_from_config(QWEN3_MOE, "qwen3-30b-a3b")
    assert (moe.experts, moe.experts_per_token, moe.ffn, moe.qk_norm) == (128, 8, 768, True)
    assert moe.params == pytest.approx(30.53e9, rel=0.003)
    nemo = spec_from_config(LLAMA | {"model_type": "mistral", "sliding_window": None}, "nemo")
    assert nemo.head_dim == 128 and nemo.window == 0


@pytest.mark.parametrize("name", ["llama2-7b", "mistral-7b-v0.1", "qwen2-0.5b", "qwen3-4b", "llama3.1-8b"])
def test_an_exported_config_reads_back(name: str) -> None:
    spec = load_model(name)
    assert spec_from_config(config_from_spec(spec), name) == spec


PHI3_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "num_hidden_layers": 32,
    "hidden_size": 3072,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 8192,
    "vocab_size": 32064,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "original_max_position_embeddings": 4096,
    "max_position_embeddings": 4096,
    "rope_scaling": None,
    "sliding_window": 2047,
}
PHI4 = PHI3_MINI | {
    "num_hidden_layers": 40,
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "intermediate_size": 17920,
    "vocab_size": 100352,
    "max_position_embeddings": 16384,
    "rope_theta": 250000,
    "sliding_window": None,
}
PHI4_MINI = PHI3_MINI | {
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 200064,
    "max_position_embeddings": 131072,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
    "interpolate_factor": 1,
    "full_attn_mod": 1,
    "sliding_window": 262144,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48},
}


@pytest.mark.parametrize(("config", "billions"), [(PHI3_MINI, 3.821), (PHI4, 14.66), (PHI4_MINI, 3.836)])
def test_phi(config: dict[str, Any], billions: float) -> None:
    """Parameter counts are those of the published weights."""
    spec = spec_from_config(config, "phi")
    assert spec.params == pytest.approx(billions * 1e9, rel=3e-3)
    assert spec_from_config(config_from_spec(spec), "phi") == spec
    assert spec.window == (config["sliding_window"] or 0) and spec.max_context == config["max_position_embeddings"]
    if config is PHI4_MINI:
        assert isinstance(spec.rope_scaling, LongRopeScaling) and spec.rotated == 96
        assert spec.rope_scaling.attention_factor == pytest.approx((1 + math.log(32) / math.log(4096)) ** 0.5)
    with pytest.raises(SpecError, match="a phi3 model has no yarn scaling"):
        spec_from_config(config | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "phi")


@pytest.mark.parametrize(("key", "value", "words", "hint"), [
    ("rope_scaling", {"type": "mrope", "factor": 4.0}, 'type is "mrope": it changes the numbers', "or longrope"),
    ("rope_scaling", {"type": "linear"}, "a linear scaling lacks factor", 'add "factor"'),
    ("rope_scaling", {"rope_type": "dynamic", "factor": -2.0}, "factor is -2.0", "factor"),
    ("rope_scaling", {**LLAMA3_ROPE, "factor": None}, "a llama3 scaling lacks factor", 'add "factor"'),
    ("rope_parameters", {"rope_type": "longrope"}, "a longrope scaling lacks short_factor", "short_factor"),
    ("attention_bias", True, "attention_bias is true: it changes the numbers and is not applied", "false alone"),
    ("mlp_bias", True, "mlp_bias is true", "false alone"),
    ("hidden_act", "gelu", 'hidden_act is "gelu"', "silu"),
    ("attention_dropout", 0.1, "attention_dropout is 0.1", "0.0"),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5", "1.0"),
    ("num_experts", 8, "key `num_experts` is not one of a llama model", "`qwen3_moe`"),
    ("sliding_window", 4, "key `sliding_window` is not one of a llama model", "`mistral`"),
    ("attn_logit_softcapping", 50.0, "key `attn_logit_softcapping` is not one of a llama model", "`gemma2`"),
    ("rms_norm_epsilon", 1e-5, "key `rms_norm_epsilon`", "`rms_norm_eps`"),
    ("rms_norm_eps", "1e-5", 'rms_norm_eps is "1e-5"; it must be a number', '"rms_norm_eps": 1.0'),
    ("max_position_embeddings", float("inf"), "max_position_embeddings is Infinity; it must be a whole number", ": 1"),
    ("num_attention_heads", 10**20, "num_attention_heads is 100000000000000000000; it must be at most", "100000000"),
    ("num_key_value_heads", 7, "num_key_value_heads is 7: it must divide the 32 attention heads", ": 1"),
    ("num_hidden_layers", True, "num_hidden_layers is true; it must be a whole number", "1"),
    ("model_type", "qwen3_next", "model_type `qwen3_next` is not known", "these run: `llama`"),
    ("model_type", 3, "model_type `3` is not known", "these run: `llama`"),
])  # fmt: skip
def test_what_would_change_the_numbers_is_refused(
    key: str, value: object, words: str, hint: str, tmp_path: Path
) -> None:
    found, advice, line, column = refusal(LLAMA | {key: value}, tmp_path)
    assert words in found and hint in advice
    text = (tmp_path / "config.json").read_text().splitlines()[line - 1]
    assert column > 1 and (f'"{key}"' in text or isinstance(value, dict))


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "model_type"])
def test_missing_keys_are_named(key: str, tmp_path: Path) -> None:
    found, hint, line, column = refusal({k: v for k, v in LLAMA.items() if k != key}, tmp_path)
    assert f"key `{key}` is missing" in found and hint and (line, column) == (1, 1)


def test_what_changes_nothing_is_known() -> None:
    inert = {
        "_name_or_path": "x",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "eos_token_id": [1, 2],
        "pruned_heads": {},
    }
    assert spec_from_config(LLAMA | inert | {"some_new_key": None}, "x") == spec_from_config(LLAMA, "x")


def test_a_window_is_a_fact_of_the_architecture() -> None:
    mistral = LLAMA | {"model_type": "mistral", "max_position_embeddings": 32768}
    assert spec_from_config(mistral | {"sliding_window": 256}, "x").window == 256
    assert spec_from_config(mistral, "x").window == 4096, "what transformers assumes"
    qwen = QWEN3 | {"sliding_window": 256, "use_sliding_window": True}
    assert spec_from_config(QWEN3 | {"sliding_window": 256}, "x").window == 0
    assert spec_from_config(qwen, "x").window == 0, "max_window_layers is above the number of layers"
    assert spec_from_config(qwen | {"max_window_layers": 20}, "x").window == 256
    full = ["full_attention"] * 36
    assert spec_from_config(qwen | {"max_window_layers": 20, "layer_types": full}, "x").window == 0


def test_the_text_model_of_several_parts_is_planned(tmp_path: Path) -> None:
    inner = QWEN3 | {"max_window_layers": 20}
    config = {"model_type": "some_vl", "text_config": inner, "vision_config": {"depth": 3}, "image_token_id": 5}
    assert spec_from_config(config, "x") == spec_from_config(inner, "x")
    found, _, line, _ = refusal(config | {"text_config": {"model_type": "other_text"}}, tmp_path)
    assert "joins a text model (`other_text`) with other parts" in found and line == 3
    found, _, line, _ = refusal(config | {"text_config": inner | {"hidden_act": "gelu"}}, tmp_path)
    assert 'hidden_act is "gelu"' in found and line > 3
    with pytest.raises(SpecError, match="its weights lie among those of other parts"):
        check_runs(tmp_path)


def test_no_family_is_taken_for_another() -> None:
    """The hint for an unknown family never offers a name that would be planned as something else."""
    for name in ("qwen3_next", "deepseek_v32", "llama4_vision"):
        with pytest.raises(SpecError) as raised:
            spec_from_config(LLAMA | {"model_type": name}, "x")
        assert "did you mean" not in str(raised.value)
        assert all(f"`{family}`" in str(raised.value) for family in FAMILIES)


@pytest.mark.parametrize(("content", "words"), [
    (b"\xef\xbb\xbf" + json.dumps(LLAMA).encode(), ""),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "git-LFS pointer"),
    (b'{"model_type": "llama",\n "hidden_size": 2 "x"}', ":2:19: not JSON"),
    (b'{"hidden_size": 2,\n "hidden_size": 4}', ":2:2: key `hidden_size` is given twice"),
    (b'{"a": "\xe9"}', ":1:8: byte 0xe9 is not UTF-8"),
    (b"[" * 100_000, ":1:61: brackets stand more than 60 deep"),
    (b"[]", "a config holds one object"),
    (b'{"model_type": [[1]], "text_config": {}}', ":1:38: model_type `[[1]]` joins a text model (`None`)"),
    (b'{"model_type": "x", "text_config": {"model_type": {}}}', "joins a text model (`{}`) with other parts"),
    (b'{"model_type": {}}', ":1:16: model_type `{}` is not known"),
    (b" " * (2**21 + 1), "more than 2,097,152 bytes"),
])  # fmt: skip
def test_files_that_are_no_config(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    if not words:
        assert spec_from_folder(tmp_path).layers == 36
        return
    with pytest.raises(SpecError) as raised:
        spec_from_folder(tmp_path)
    assert words in str(raised.value)


@pytest.mark.parametrize(("keys", "found"), [
    ({}, 0.0), ({"router_aux_loss_coef": 0.02}, 0.0), ({"output_router_logits": True}, 0.001),
    ({"output_router_logits": True, "router_aux_loss_coef": 0.02}, 0.02),
    ({"text_config": {"output_router_logits": True, "router_aux_loss_coef": 1}}, 1.0),
])  # fmt: skip
def test_the_balance_of_experts_counts_as_in_transformers(keys: dict[str, Any], found: float, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert router_aux_loss_coef(tmp_path) == found
    (tmp_path / "config.json").write_text('{"output_router_logits": true, "router_aux_loss_coef": "much"}')
    with pytest.raises(SpecError, match="router_aux_loss_coef is"):
        router_aux_loss_coef(tmp_path)
