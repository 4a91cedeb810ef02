"""One record per Hugging Face `model_type`: which keys of its `config.json` are obeyed, and how they make a ModelSpec.

The list of keys is closed. A field of the record is obeyed, or is an `Only` field, whose other values would change the
numbers and are refused. `INERT` keys mean nothing for the architecture. Every other key is refused, because it may
change the numbers. Defaults are those that `transformers` takes for an absent key.

A new family is one more class here, added to `FAMILIES`, and its tensor names in `runtime/weights/hf_names.py`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from plans.config_keys import (
    Closed,
    Experts,
    NoDropout,
    Off,
    Portion,
    PositiveNumber,
    Rope,
    Size,
    Tiny,
    only,
    refusal,
)
from plans.decoder import Decoder, Windowed
from plans.planned_families import DeepseekV2, DeepseekV3, GptOss, Llama4


class Llama(Decoder):
    """Llama 1 to 3, and what copies it (SmolLM2, DeepSeek's dense models, Yi)."""

    ARCHITECTURE = "LlamaForCausalLM"
    max_position_embeddings: Size = 2048
    attention_bias: Off = False
    mlp_bias: Off = False


class Mistral(Decoder):
    """Mistral and Ministral text models; an absent window means 4,096 tokens."""

    ARCHITECTURE = "MistralForCausalLM"
    num_key_value_heads: Size | None = 8
    max_position_embeddings: Size = 131072
    sliding_window: Annotated[int, Field(ge=0, le=10**8)] | None = 4096

    def window(self) -> int:
        return self.sliding_window or 0


class Qwen2(Windowed):
    """Qwen2 and Qwen2.5: biases on query, key and value."""

    ARCHITECTURE = "Qwen2ForCausalLM"
    num_key_value_heads: Size | None = 32
    max_position_embeddings: Size = 32768

    def more(self) -> dict[str, Any]:
        return super().more() | {"qkv_bias": True}


class Qwen3(Windowed):
    """Qwen3: norms of query and key."""

    ARCHITECTURE = "Qwen3ForCausalLM"
    num_key_value_heads: Size | None = 32
    head_dim: Size | None = 128
    max_position_embeddings: Size = 32768
    attention_bias: Off = False

    def more(self) -> dict[str, Any]:
        return super().more() | {"qk_norm": True}


class Phi3(Decoder):
    """Phi-3, Phi-3.5 and Phi-4 (mini and 14B): fused weights, a part of each head rotated, longrope."""

    ARCHITECTURE = "Phi3ForCausalLM"
    PARTIAL = True
    rms_norm_eps: Tiny = 1e-5
    max_position_embeddings: Size = 4096
    original_max_position_embeddings: Size | None = 4096
    partial_rotary_factor: Portion = 1.0
    sliding_window: Annotated[int, Field(ge=0, le=10**8)] | None = None
    resid_pdrop: NoDropout = 0.0
    embd_pdrop: NoDropout = 0.0
    attention_bias: Off = False
    lm_head_bias: Off = False
    mlp_bias: Off = False
    interpolate_factor: Annotated[int, only(1)] = 1
    full_attn_mod: Annotated[int, only(1)] = 1

    @model_validator(mode="after")
    def _known_scaling(self) -> Phi3:
        if self.rope.kind not in ("default", "longrope"):
            raise refusal(f"a phi3 model has no {self.rope.kind} scaling", "longrope", "rope_scaling")
        return self

    def window(self) -> int:
        return self.sliding_window or 0

    def more(self) -> dict[str, Any]:
        return {"ffn": self.intermediate_size, "family": "phi3"}


class Mixtral(Decoder):
    """Mixtral: every layer is a choice of experts."""

    ARCHITECTURE = "MixtralForCausalLM"
    num_key_value_heads: Size | None = 8
    max_position_embeddings: Size = 131072
    rms_norm_eps: Tiny = 1e-5
    rope_theta: PositiveNumber = 1e6
    sliding_window: Annotated[int, Field(ge=0, le=10**8)] | None = None
    num_local_experts: Experts = 8
    num_experts_per_tok: Experts = 2
    router_jitter_noise: NoDropout = 0.0

    def window(self) -> int:
        return self.sliding_window or 0

    def more(self) -> dict[str, Any]:
        return {
            "ffn": self.intermediate_size,
            "experts": self.num_local_experts,
            "experts_per_token": self.num_experts_per_tok,
        }


class _QwenExperts(Windowed):
    """Qwen's experts: in every layer, each `moe_intermediate_size` wide."""

    max_position_embeddings: Size = 32768
    moe_intermediate_size: Size
    num_experts: Experts | None = None
    num_local_experts: Experts | None = None
    num_experts_per_tok: Experts
    norm_topk_prob: bool = False
    decoder_sparse_step: Annotated[int, only(1)] = 1
    mlp_only_layers: Annotated[list[int] | None, only([], None)] = None

    def more(self) -> dict[str, Any]:
        return super().more() | {
            "ffn": self.moe_intermediate_size,
            "experts": self.num_experts or self.num_local_experts or 0,
            "experts_per_token": self.num_experts_per_tok,
            "normalize_gates": self.norm_topk_prob,
        }


class Qwen2Moe(_QwenExperts):
    """Qwen1.5-MoE and Qwen2-MoE: a shared expert beside the chosen ones."""

    ARCHITECTURE = "Qwen2MoeForCausalLM"
    num_key_value_heads: Size | None = 16
    shared_expert_intermediate_size: Annotated[int, Field(ge=0, le=10**8)] = 5632
    qkv_bias: Annotated[bool, only(True)] = True

    def more(self) -> dict[str, Any]:
        return super().more() | {"shared_ffn": self.shared_expert_intermediate_size, "qkv_bias": True}


class Qwen3Moe(_QwenExperts):
    """Qwen3's experts."""

    ARCHITECTURE = "Qwen3MoeForCausalLM"
    num_key_value_heads: Size | None = 4
    attention_bias: Off = False

    def more(self) -> dict[str, Any]:
        return super().more() | {"qk_norm": True}


class Gemma(Decoder):
    """Gemma: norms that multiply by 1 + weight, scaled embeddings, a tanh-approximated GELU."""

    ARCHITECTURE = "GemmaForCausalLM"
    hidden_act: Annotated[str, only("gelu", "gelu_pytorch_tanh")] = "gelu_pytorch_tanh"
    hidden_activation: Annotated[str | None, only("gelu_pytorch_tanh", None)] = "gelu_pytorch_tanh"
    head_dim: Size | None = 256
    vocab_size: Size = 256000
    tie_word_embeddings: bool = True
    max_position_embeddings: Size = 8192
    attention_bias: Off = False
    use_bidirectional_attention: Annotated[bool | None, only(False, None)] = None
    cache_implementation: str | None = None

    def more(self) -> dict[str, Any]:
        return super().more() | {
            "activation": "gelu_tanh",
            "norm_offset": True,
            "embedding_scale": math.sqrt(self.hidden_size),
            "family": self.model_type,
        }


class Gemma2(Gemma):
    """Gemma 2: norms before and after, soft caps, a window in every other layer."""

    ARCHITECTURE = "Gemma2ForCausalLM"
    PATTERN: ClassVar[int] = 2
    query_pre_attn_scalar: Annotated[float, Field(gt=0, le=10**6, strict=False)] = 256
    sliding_window: Annotated[int, Field(ge=0, le=10**8)] | None = 4096
    sliding_window_size: Annotated[int, Field(ge=0, le=10**8)] | None = None
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    attn_logit_softcapping: PositiveNumber | None = 50.0
    final_logit_softcapping: PositiveNumber | None = 30.0

    @model_validator(mode="after")
    def _known_layers(self) -> Gemma2:
        known = ["sliding_attention", "full_attention"]
        if self.layer_types is not None and self.layer_types != [
            known[(i + 1) % self.pattern() == 0] for i in range(self.num_hidden_layers)
        ]:
            words = f"layers without a window other than every {self.pattern()}th"
            raise refusal(words, "leave it out", "layer_types")
        return self

    def pattern(self) -> int:
        """Every so many-th layer has no window."""
        return self.PATTERN

    def window(self) -> int:
        return self.sliding_window or 0

    def more(self) -> dict[str, Any]:
        return super().more() | {
            "norms_per_layer": 4,
            "query_scalar": float(self.query_pre_attn_scalar),
            "attention_cap": self.attn_logit_softcapping or 0.0,
            "logit_cap": self.final_logit_softcapping or 0.0,
            "full_every": self.pattern() if self.window() else 0,
        }


class _LayeredRope(Closed):
    """Rotary positions by kind of layer."""

    full_attention: Rope
    sliding_attention: Rope


class Gemma3(Gemma2):
    """Gemma 3: norms of query and key, five layers with a window to one without, which have a rope theta of their
    own."""

    ARCHITECTURE = "Gemma3ForCausalLM"
    num_attention_heads: Size = 8
    num_key_value_heads: Size | None = 4
    vocab_size: Size = 262208
    max_position_embeddings: Size = 131072
    attn_logit_softcapping: PositiveNumber | None = None
    final_logit_softcapping: PositiveNumber | None = None
    rope_theta: PositiveNumber = 1e6
    rope_local_base_freq: PositiveNumber = 10000.0
    rope_parameters: Rope | _LayeredRope | None = None  # type: ignore[assignment]
    sliding_window_pattern: Annotated[int, Field(ge=1, le=10**4)] = 6
    use_bidirectional_attention: Annotated[bool | None, only(False, None)] = False

    def pattern(self) -> int:
        return self.sliding_window_pattern

    @property
    def rope(self) -> Rope:
        found = self.rope_parameters
        whole = found.full_attention if isinstance(found, _LayeredRope) else found
        return whole or self.rope_scaling or Rope()

    def more(self) -> dict[str, Any]:
        found, local = self.rope_parameters, self.rope_local_base_freq
        if isinstance(found, _LayeredRope):
            local = found.sliding_attention.rope_theta or local
        return super().more() | {"qk_norm": True, "local_rope_theta": local if self.window() else 0.0}


class Olmo2(Decoder):
    """OLMo 2: norms behind attention and MLP alone, and of all heads of query and key together."""

    ARCHITECTURE = "Olmo2ForCausalLM"
    rms_norm_eps: Tiny = 1e-5
    max_position_embeddings: Size = 2048
    attention_bias: Off = False

    def more(self) -> dict[str, Any]:
        return super().more() | {"post_norms": True, "qk_norm": True, "wide_qk_norm": True, "family": "olmo2"}


class Glm(Decoder):
    """GLM-4-9B: half of each head rotated, neighbour by neighbour."""

    ARCHITECTURE = "GlmForCausalLM"
    PARTIAL = True
    num_key_value_heads: Size | None = 2
    head_dim: Size | None = 128
    rms_norm_eps: Tiny = 1.5625e-7
    max_position_embeddings: Size = 131072
    partial_rotary_factor: Portion = 0.5
    attention_bias: bool = True

    def more(self) -> dict[str, Any]:
        return super().more() | {"qkv_bias": self.attention_bias, "family": self.model_type}


class Glm4(Glm):
    """GLM-4-0414: norms before and after."""

    ARCHITECTURE = "Glm4ForCausalLM"

    def more(self) -> dict[str, Any]:
        return super().more() | {"norms_per_layer": 4}


FAMILIES: dict[str, type[Decoder]] = {
    "llama": Llama,
    "mistral": Mistral,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "phi3": Phi3,
    "mixtral": Mixtral,
    "qwen2_moe": Qwen2Moe,
    "qwen3_moe": Qwen3Moe,
    "gemma": Gemma,
    "gemma2": Gemma2,
    "gemma3_text": Gemma3,
    "olmo2": Olmo2,
    "glm": Glm,
    "glm4": Glm4,
    "gpt_oss": GptOss,
    "llama4_text": Llama4,
    "deepseek_v2": DeepseekV2,
    "deepseek_v3": DeepseekV3,
}
