"""Families that can be planned and not run: their records, as those in `plans/families.py`, with `RUNS = False`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from plans.config_keys import (
    Experts,
    NoDropout,
    Off,
    PositiveNumber,
    Size,
    Tiny,
    only,
    refusal,
)
from plans.decoder import Decoder


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
    max_position_embeddings: Size = 4096
    first_k_dense_replace: Annotated[int, Field(ge=0, le=10**4)] = 3
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=100)] = 1
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: PositiveNumber = 2.5
