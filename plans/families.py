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


class GptOss(Decoder):
    """GPT-OSS: attention sinks, a clamped activation, biases everywhere, a window in every other layer."""

    RUNS = False
    ARCHITECTURE = "GptOssForCausalLM"
    num_key_value_heads: Size | None = 8
    head_dim: Size | None = 64
    vocab_size: Size = 201088
    rms_norm_eps: Tiny = 1e-5
    max_position_embeddings: Size = 131072
    rope_theta: PositiveNumber = 150000.0
    num_local_experts: Experts = 128
    num_experts_per_tok: Experts = 4
    experts_per_token: Experts | None = None
    initial_context_length: Size | None = None
    swiglu_limit: PositiveNumber = 7.0
    rope_scaling_factor: PositiveNumber | None = None
    rope_ntk_alpha: PositiveNumber | None = None
    rope_ntk_beta: PositiveNumber | None = None
    attention_bias: Annotated[bool, only(True)] = True
    sliding_window: Annotated[int, Field(ge=0, le=10**8)] | None = 128
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None

    @model_validator(mode="after")
    def _known_layers(self) -> GptOss:
        known = ["sliding_attention", "full_attention"]
        if self.layer_types not in (None, [known[i % 2] for i in range(self.num_hidden_layers)]):
            raise refusal("layers without a window other than every 2nd", "leave it out", "layer_types")
        return self

    def window(self) -> int:
        return self.sliding_window or 0

    def more(self) -> dict[str, Any]:
        return super().more() | {
            "experts": self.num_local_experts,
            "experts_per_token": self.experts_per_token or self.num_experts_per_tok,
            "linear_bias": True,
            "sinks": True,
            "full_every": 2 if self.window() else 0,
            "family": "gpt_oss",
        }


class Llama4(Decoder):
    """Llama 4's text model: a shared expert beside one chosen, attention in chunks but for every 4th layer, which has
    no positions either."""

    RUNS = False
    ARCHITECTURE = "Llama4ForCausalLM"
    num_key_value_heads: Size | None = 8
    head_dim: Size | None = 128
    intermediate_size_mlp: Size = 16384
    vocab_size: Size = 202048
    rms_norm_eps: Tiny = 1e-5
    max_position_embeddings: Size = 131072
    rope_theta: PositiveNumber = 500000.0
    num_local_experts: Experts = 16
    num_experts_per_tok: Experts = 1
    interleave_moe_layer_step: Annotated[int, Field(ge=1, le=10**4)] = 1
    moe_layers: list[int] | None = None
    attention_chunk_size: Annotated[int, Field(ge=0, le=10**8)] | None = 8192
    no_rope_layer_interval: Annotated[int, only(4)] = 4
    no_rope_layers: list[int] | None = None
    layer_types: list[Literal["full_attention", "chunked_attention"]] | None = None
    use_qk_norm: bool = True
    attn_temperature_tuning: bool | int = True
    floor_scale: PositiveNumber = 8192
    attn_scale: PositiveNumber = 0.1
    attention_bias: Off = False
    router_jitter_noise: NoDropout = 0.0
    for_llm_compressor: bool = False

    @model_validator(mode="after")
    def _known_layers(self) -> Llama4:
        step, layers = self.interleave_moe_layer_step, self.num_hidden_layers
        if self.moe_layers not in (None, list(range(step - 1, layers, step))):
            raise refusal(f"experts in other layers than every {step}th", "leave it out", "moe_layers")
        without = [int((i + 1) % 4 != 0) for i in range(layers)]
        if self.no_rope_layers not in (None, [], without):
            raise refusal("positions in other layers than all but every 4th", "leave it out", "no_rope_layers")
        if self.layer_types not in (None, [("full_attention", "chunked_attention")[one] for one in without]):
            raise refusal("chunks in other layers than all but every 4th", "leave it out", "layer_types")
        return self

    def window(self) -> int:
        return self.attention_chunk_size or 0

    def more(self) -> dict[str, Any]:
        step = self.interleave_moe_layer_step
        return super().more() | {
            "experts": self.num_local_experts,
            "experts_per_token": self.num_experts_per_tok,
            "shared_ffn": self.intermediate_size,
            "shared_gate": False,
            "experts_every": step,
            "dense_ffn": self.intermediate_size_mlp if step > 1 else 0,
            "full_every": 4 if self.window() else 0,
            "family": "llama4_text",
        }


class DeepseekV2(Decoder):
    """DeepSeek-V2: latent attention, dense layers first, shared experts, experts chosen by groups."""

    RUNS = False
    PARTIAL = True
    ARCHITECTURE = "DeepseekV2ForCausalLM"
    max_position_embeddings: Size = 2048
    q_lora_rank: Size | None = 1536
    kv_lora_rank: Size = 512
    qk_nope_head_dim: Size = 128
    qk_rope_head_dim: Size = 64
    v_head_dim: Size = 128
    moe_intermediate_size: Size
    n_routed_experts: Experts
    n_shared_experts: Annotated[int, Field(ge=0, le=10**3)] | None = None
    num_experts_per_tok: Experts
    first_k_dense_replace: Annotated[int, Field(ge=0, le=10**4)] = 0
    moe_layer_freq: Annotated[int, only(1)] = 1
    n_group: Annotated[int, Field(ge=1, le=10**4)] | None = None
    topk_group: Annotated[int, Field(ge=1, le=10**4)] | None = None
    topk_method: str | None = None
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: PositiveNumber = 1.0
    aux_loss_alpha: Annotated[float, Field(ge=0, le=1)] = 0.001
    seq_aux: bool = True
    ep_size: Annotated[int, Field(ge=1, le=10**4)] = 1
    attention_bias: Off = False
    mlp_bias: Off = False
    rope_interleave: bool = True

    def rotary_dim(self) -> int:
        return self.qk_rope_head_dim

    def more(self) -> dict[str, Any]:
        return {
            "ffn": self.moe_intermediate_size,
            "kv_heads": self.num_attention_heads,
            "head_dim": self.qk_nope_head_dim + self.qk_rope_head_dim,
            "q_rank": self.q_lora_rank or 0,
            "kv_rank": self.kv_lora_rank,
            "value_dim": self.v_head_dim,
            "experts": self.n_routed_experts,
            "experts_per_token": self.num_experts_per_tok,
            "normalize_gates": self.norm_topk_prob,
            "shared_ffn": (self.n_shared_experts or 0) * self.moe_intermediate_size,
            "shared_gate": False,
            "dense_first": self.first_k_dense_replace,
            "dense_ffn": self.intermediate_size if self.first_k_dense_replace else 0,
            "family": self.model_type,
        }


class DeepseekV3(DeepseekV2):
    """DeepSeek-V3 and R1. The layers that predict further tokens (multi-token prediction) are left out: generation and
    RL use the main model alone."""

    ARCHITECTURE = "DeepseekV3ForCausalLM"
    max_position_embeddings: Size = 163840
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=100)] = 0
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: PositiveNumber = 2.5


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
