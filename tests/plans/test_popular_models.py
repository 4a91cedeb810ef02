"""Configs of models that people download: the parameters that their makers publish, or a refusal that says what is new.

Facts are written anew, one row a model: layers, hidden size, heads, key-value heads, head size, MLP width, vocabulary,
tied embeddings, other keys, and billions of parameters (of models with images, of the text model).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from plans.errors import SpecError
from plans.families import FAMILIES
from plans.huggingface import spec_from_config
from plans.layout import model_units
from plans.library import load_model
from plans.model import ModelSpec
from plans.runnable import spec_problems

Row = tuple[str, int, int, int, int, int, int, int, bool, dict[str, Any], float]
NAMED = ("qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "glm4", "gpt_oss", "llama4_text")
MOE30 = {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
MOE235 = {"moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8}
MOE2 = {"moe_intermediate_size": 1408, "num_experts": 60, "num_experts_per_tok": 4}
MAVERICK = {"num_local_experts": 128, "interleave_moe_layer_step": 2}
LITE = {"q_lora_rank": None, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408, "first_k_dense_replace": 1}  # fmt: skip
V2 = LITE | {"q_lora_rank": 1536, "n_routed_experts": 160, "moe_intermediate_size": 1536}
V3 = V2 | {"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
           "first_k_dense_replace": 3, "num_nextn_predict_layers": 1}  # fmt: skip
POPULAR: dict[str, Row] = {
    "Llama-2-7b": ("llama", 32, 4096, 32, 32, 128, 11008, 32000, False, {}, 6.738),
    "Llama-2-13b": ("llama", 40, 5120, 40, 40, 128, 13824, 32000, False, {}, 13.016),
    "Llama-2-70b": ("llama", 80, 8192, 64, 8, 128, 28672, 32000, False, {}, 68.977),
    "Llama-3-8B": ("llama", 32, 4096, 32, 8, 128, 14336, 128256, False, {}, 8.030),
    "Llama-3.1-70B": ("llama", 80, 8192, 64, 8, 128, 28672, 128256, False, {}, 70.554),
    "Llama-3.1-405B": ("llama", 126, 16384, 128, 8, 128, 53248, 128256, False, {}, 405.853),
    "Llama-3.2-1B": ("llama", 16, 2048, 32, 8, 64, 8192, 128256, True, {}, 1.236),
    "Llama-3.2-3B": ("llama", 28, 3072, 24, 8, 128, 8192, 128256, True, {}, 3.213),
    "TinyLlama-1.1B": ("llama", 22, 2048, 32, 4, 64, 5632, 32000, False, {}, 1.100),
    "SmolLM2-135M": ("llama", 30, 576, 9, 3, 64, 1536, 49152, True, {}, 0.1345),
    "SmolLM2-360M": ("llama", 32, 960, 15, 5, 64, 2560, 49152, True, {}, 0.3618),
    "SmolLM2-1.7B": ("llama", 24, 2048, 32, 32, 64, 8192, 49152, True, {}, 1.711),
    "Yi-34B": ("llama", 60, 7168, 56, 8, 128, 20480, 64000, False, {}, 34.389),
    "Mistral-7B-v0.1": ("mistral", 32, 4096, 32, 8, 128, 14336, 32000, False, {}, 7.242),
    "Mistral-7B-v0.3": ("mistral", 32, 4096, 32, 8, 128, 14336, 32768, False, {}, 7.248),
    "Mistral-Nemo-12B": ("mistral", 40, 5120, 32, 8, 128, 14336, 131072, False, {}, 12.248),
    "Mixtral-8x7B": ("mixtral", 32, 4096, 32, 8, 128, 14336, 32000, False, {}, 46.703),
    "Mixtral-8x22B": ("mixtral", 56, 6144, 48, 8, 128, 16384, 32000, False, {}, 140.621),
    "Qwen2.5-0.5B": ("qwen2", 24, 896, 14, 2, 64, 4864, 151936, True, {}, 0.494),
    "Qwen2.5-1.5B": ("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, True, {}, 1.544),
    "Qwen2.5-3B": ("qwen2", 36, 2048, 16, 2, 128, 11008, 151936, True, {}, 3.086),
    "Qwen2.5-7B": ("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, False, {}, 7.616),
    "Qwen2.5-14B": ("qwen2", 48, 5120, 40, 8, 128, 13824, 152064, False, {}, 14.770),
    "Qwen2.5-32B": ("qwen2", 64, 5120, 40, 8, 128, 27648, 152064, False, {}, 32.764),
    "Qwen2.5-72B": ("qwen2", 80, 8192, 64, 8, 128, 29568, 152064, False, {}, 72.706),
    "Qwen3-0.6B": ("qwen3", 28, 1024, 16, 8, 128, 3072, 151936, True, {}, 0.596),
    "Qwen3-1.7B": ("qwen3", 28, 2048, 16, 8, 128, 6144, 151936, True, {}, 1.721),
    "Qwen3-4B": ("qwen3", 36, 2560, 32, 8, 128, 9728, 151936, True, {}, 4.022),
    "Qwen3-8B": ("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, False, {}, 8.191),
    "Qwen3-14B": ("qwen3", 40, 5120, 40, 8, 128, 17408, 151936, False, {}, 14.768),
    "Qwen3-32B": ("qwen3", 64, 5120, 64, 8, 128, 25600, 151936, False, {}, 32.762),
    "Qwen3-30B-A3B": ("qwen3_moe", 48, 2048, 32, 4, 128, 6144, 151936, False, MOE30, 30.532),
    "Qwen3-235B-A22B": ("qwen3_moe", 94, 4096, 64, 4, 128, 12288, 151936, False, MOE235, 235.094),
    "Qwen1.5-MoE-A2.7B": ("qwen2_moe", 24, 2048, 16, 16, 128, 5632, 151936, False, MOE2, 14.316),
    "Phi-3-mini": ("phi3", 32, 3072, 32, 32, 96, 8192, 32064, False, {}, 3.821),
    "Phi-3-medium": ("phi3", 40, 5120, 40, 10, 128, 17920, 32064, False, {}, 13.960),
    "Phi-4": ("phi3", 40, 5120, 40, 10, 128, 17920, 100352, False, {}, 14.660),
    "Phi-4-mini": ("phi3", 32, 3072, 24, 8, 128, 8192, 200064, True, {"partial_rotary_factor": 0.75}, 3.836),
    "gemma-2b": ("gemma", 18, 2048, 8, 1, 256, 16384, 256000, True, {}, 2.506),
    "gemma-7b": ("gemma", 28, 3072, 16, 16, 256, 24576, 256000, True, {}, 8.538),
    "gemma-2-2b": ("gemma2", 26, 2304, 8, 4, 256, 9216, 256000, True, {}, 2.614),
    "gemma-2-9b": ("gemma2", 42, 3584, 16, 8, 256, 14336, 256000, True, {}, 9.242),
    "gemma-2-27b": ("gemma2", 46, 4608, 32, 16, 128, 36864, 256000, True, {"query_pre_attn_scalar": 144}, 27.227),
    "gemma-3-1b": ("gemma3_text", 26, 1152, 4, 1, 256, 6912, 262144, True, {"sliding_window": 512}, 1.000),
    "gemma-3-4b": ("gemma3_text", 34, 2560, 8, 4, 256, 10240, 262208, True, {"sliding_window": 1024}, 3.880),
    "gemma-3-12b": ("gemma3_text", 48, 3840, 16, 8, 256, 15360, 262208, True, {"sliding_window": 1024}, 11.766),
    "gemma-3-27b": ("gemma3_text", 62, 5376, 32, 16, 128, 21504, 262208, True, {"sliding_window": 1024}, 27.009),
    "OLMo-2-7B": ("olmo2", 32, 4096, 32, 32, 128, 11008, 100352, False, {}, 7.299),
    "OLMo-2-13B": ("olmo2", 40, 5120, 40, 40, 128, 13824, 100352, False, {}, 13.716),
    "gpt-oss-20b": ("gpt_oss", 24, 2880, 64, 8, 64, 2880, 201088, False, {"num_local_experts": 32}, 20.91),
    "gpt-oss-120b": ("gpt_oss", 36, 2880, 64, 8, 64, 2880, 201088, False, {}, 116.83),
    "Llama-4-Scout": ("llama4_text", 48, 5120, 40, 8, 128, 8192, 202048, False, {}, 107.77),
    "Llama-4-Maverick": ("llama4_text", 48, 5120, 40, 8, 128, 8192, 202048, False, MAVERICK, 400.71),
    "DeepSeek-V2-Lite": ("deepseek_v2", 27, 2048, 16, 16, 128, 10944, 102400, False, LITE, 15.706),
    "DeepSeek-V2": ("deepseek_v2", 60, 5120, 128, 128, 128, 12288, 102400, False, V2, 235.741),
    "DeepSeek-V3": ("deepseek_v3", 61, 7168, 128, 128, 128, 18432, 129280, False, V3, 671.026),
    "GLM-4-9B-0414": ("glm4", 40, 4096, 32, 2, 128, 13696, 151552, False, {}, 9.400),
}


def config_of(row: Row) -> dict[str, Any]:
    """The config of a row. The head size is left out where it follows and the family does not ask for it."""
    kind, layers, hidden, heads, kv_heads, head_dim, width, vocab, tied, more, _ = row
    named = kind in NAMED or (head_dim * heads != hidden and not kind.startswith("deepseek"))
    return {
        "model_type": kind, "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": width, "vocab_size": vocab,
        "tie_word_embeddings": tied, "max_position_embeddings": 4096,
        **({"head_dim": head_dim} if named else {}), **more,
    }  # fmt: skip


@pytest.mark.parametrize("name", POPULAR)
def test_popular_models_have_their_published_parameters(name: str) -> None:
    row = POPULAR[name]
    spec = spec_from_config(config_of(row), name)
    assert spec.params / 1e9 == pytest.approx(row[-1], rel=3e-3)
    inside = {"model_type": "some_vl", "text_config": config_of(row), "vision_config": {}}
    assert spec_from_config(inside, name) == spec, "the text model among other parts"


@pytest.mark.parametrize("kind", ["deepseek_v32", "qwen3_next", "falcon", "mamba2"])
def test_what_is_new_is_refused_by_its_name(kind: str) -> None:
    config = config_of(POPULAR["Llama-3-8B"]) | {"model_type": kind}
    with pytest.raises(SpecError, match=f"model_type `{kind}` is not known"):
        spec_from_config(config, "x")
    inside = {"model_type": "some_vl", "text_config": config}
    with pytest.raises(SpecError, match=rf"joins a text model \(`{kind}`\) with other parts"):
        spec_from_config(inside, "x")


def planned_only(spec: ModelSpec) -> bool:
    return any("traits of the family" in problem.message for problem in spec_problems(spec))


def test_families_that_are_planned_alone_say_so() -> None:
    alone = {row[0] for name, row in POPULAR.items() if planned_only(spec_from_config(config_of(row), name))}
    assert alone == {"gpt_oss", "llama4_text", "deepseek_v2", "deepseek_v3"}
    assert alone == {name for name, family in FAMILIES.items() if not family.RUNS}


def test_the_library_has_the_shapes_of_the_configs() -> None:
    for name in ("DeepSeek-V2", "DeepSeek-V3", "gpt-oss-20b", "gpt-oss-120b", "Llama-4-Scout", "Llama-4-Maverick"):
        ours = name.lower().replace("llama-4", "llama4")
        read = spec_from_config(config_of(POPULAR[name]), ours)
        assert replace(read, max_context=0x1000, rope_theta=1.0, norm_eps=1.0) == replace(
            load_model(ours), max_context=0x1000, rope_theta=1.0, norm_eps=1.0
        )


def test_units_add_up_to_the_published_parameters() -> None:
    for name in ("deepseek-v2", "deepseek-v3", "gpt-oss-20b", "llama4-scout", "llama4-maverick"):
        spec = replace(load_model(name), vocab=128)
        assert sum(parameter.size for unit in model_units(spec) for parameter in unit.parameters) == spec.params
