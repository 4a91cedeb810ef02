"""One record per Hugging Face `model_type`: which keys of its `config.json` are obeyed, and how they make a ModelSpec.

The list of keys is closed. A field of the record is obeyed, or is an `Only` field, whose other values would change the
numbers and are refused. `INERT` keys mean nothing for the architecture. Every other key is refused, because it may
change the numbers. Defaults are those that `transformers` takes for an absent key.

A new family is one more class here, added to `FAMILIES`, and its tensor names in `runtime/weights/hf_names.py`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from plans.model import ModelSpec
from plans.problems import REFUSED
from plans.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)

_INERT = """
    architectures auto_map attn_implementation bos_token_id chunk_size_feed_forward custom_pipelines dtype
    eos_token_id finetuning_task id2label initializer_range is_decoder keys_to_ignore_at_inference label2id
    max_length model_max_length model_name name_or_path num_labels output_attentions output_hidden_states
    output_router_logits pad_token_id problem_type quantization_config return_dict router_aux_loss_coef
    sep_token_id task_specific_params temperature tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache bad_words_ids
    begin_suppress_tokens suppress_tokens do_sample exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_scores prefix remove_invalid_values repetition_penalty return_dict_in_generate
    tf_legacy_loss tie_encoder_decoder typical_p decoder_start_token_id diversity_penalty early_stopping
    encoder_no_repeat_ngram_size bos_token eos_token pad_token pretraining_tp is_llama_config
    max_sequence_length gradient_checkpointing transformers.js_config language
"""
INERT = frozenset(_INERT.split())
"""Keys that say nothing about the architecture; so does every key that starts with an underscore."""

Size = Annotated[int, Field(ge=1, le=10**8)]
Experts = Annotated[int, Field(ge=1, le=10**5)]
Layers = Annotated[int, Field(ge=1, le=10**4)]
Tiny = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Amount = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]


def _refusal(words: str, hint: str, key: str | None = None) -> PydanticCustomError:
    """What a validator raises; `key` is to blame where a rule joins several."""
    return PydanticCustomError(REFUSED, words, {"hint": hint, "key": key})


def only(*legal: Any) -> AfterValidator:
    """A validator that refuses every value but those that change nothing."""

    def check(value: Any) -> Any:
        if value not in legal:
            words = " or ".join("null" if v is None else str(v).lower() for v in legal)
            raise _refusal("it changes the numbers and is not applied", f"{words} alone")
        return value

    return AfterValidator(check)


Off = Annotated[bool, only(False)]
NoDropout = Annotated[float, only(0.0)]
Whole = Annotated[float, only(1.0)]
Share = Annotated[float, Field(gt=0, le=1)]
RopeType = Annotated[str, only("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su")]
Silu = Annotated[str, only("silu", "swish")]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Factors = Annotated[list[Amount], Field(min_length=1, max_length=4096)]
_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}


class Rope(_Closed):
    """Rotary positions: `rope_parameters` of newer configs, `rope_scaling` of older ones."""

    rope_type: RopeType | None = None
    type: RopeType | None = None
    rope_theta: Amount | None = None
    factor: Amount | None = None
    low_freq_factor: Amount | None = None
    high_freq_factor: Amount | None = None
    original_max_position_embeddings: Size | None = None
    partial_rotary_factor: Share | None = None
    attention_factor: Amount | None = None
    beta_fast: Amount | None = None
    beta_slow: Amount | None = None
    mscale: Amount | None = None
    mscale_all_dim: Amount | None = None
    truncate: bool | None = None
    short_factor: Factors | None = None
    long_factor: Factors | None = None

    @model_validator(mode="after")
    def _complete(self) -> Rope:
        missing = [key for key in _NEEDS.get(self.kind, ()) if getattr(self, key) is None]
        if missing:
            raise _refusal(f"a {self.kind} scaling lacks " + ", ".join(missing), f'add "{missing[0]}"')
        return self

    @property
    def kind(self) -> str:
        """How positions are scaled."""
        kind = self.rope_type or self.type or "default"
        return "longrope" if kind == "su" else kind

    def scaling(self, max_positions: int, original: int | None) -> RopeScaling | None:
        """The scaling of a ModelSpec. `original`: the first context, where the config says it outside of this record.
        Defaults are those of `transformers`."""
        first = original or self.original_max_position_embeddings or max_positions
        factor = self.factor or max_positions / first
        match self.kind:
            case "linear":
                return LinearScaling(factor=factor)
            case "dynamic":
                return DynamicScaling(factor=factor, original_max_position=max_positions)
            case "llama3":
                low, high = self.low_freq_factor or 0.0, self.high_freq_factor or 0.0
                return Llama3Scaling(
                    factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position=first
                )
            case "yarn":
                return self._yarn(factor, first)
            case "longrope":
                loud = math.sqrt(1 + math.log(factor) / math.log(first)) if factor > 1 else 1.0
                return LongRopeScaling(
                    short_factor=tuple(self.short_factor or ()),
                    long_factor=tuple(self.long_factor or ()),
                    original_max_position=first,
                    attention_factor=self.attention_factor or loud,
                )
        return None

    def _yarn(self, factor: float, first: int) -> YarnScaling:
        def loud(scale: float) -> float:
            return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

        both = self.mscale and self.mscale_all_dim
        default = loud(self.mscale) / loud(self.mscale_all_dim) if both else loud(1.0)  # type: ignore[arg-type]
        return YarnScaling(
            factor=factor,
            original_max_position=first,
            attention_factor=self.attention_factor or default,
            beta_fast=self.beta_fast or 32.0,
            beta_slow=self.beta_slow or 1.0,
            truncate=self.truncate is not False,
        )


class Decoder(_Closed):
    """What the families have in common: rotary positions, RMSNorm, a gated MLP, a vocabulary head.

    RUNS: the runtime computes it; else it can be planned only. PARTIAL: a part of each head may be rotated.
    ARCHITECTURE names it in an exported config.
    """

    RUNS: ClassVar[bool] = True
    PARTIAL: ClassVar[bool] = False
    ARCHITECTURE: ClassVar[str]

    model_type: str
    num_hidden_layers: Layers
    hidden_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    intermediate_size: Size
    vocab_size: Size
    hidden_act: Silu = "silu"
    tie_word_embeddings: bool = False
    rms_norm_eps: Tiny = 1e-6
    max_position_embeddings: Size
    rope_theta: Amount = 10000.0
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    attention_dropout: NoDropout = 0.0
    partial_rotary_factor: Whole = 1.0
    original_max_position_embeddings: Size | None = None
    rope_interleaved: Off = False
    use_mrope: Off = False
    is_encoder_decoder: Off = False
    add_cross_attention: Off = False

    @model_validator(mode="after")
    def _fits(self) -> Decoder:
        heads, groups = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if heads % groups:
            words = f"it must divide the {heads} attention heads"
            raise _refusal(words, f'"num_key_value_heads": {math.gcd(heads, groups)}', "num_key_value_heads")
        if not self.head_dim and self.hidden_size % heads:
            words = f"it must divide hidden_size {self.hidden_size}"
            legal = math.gcd(heads, self.hidden_size)
            raise _refusal(words, f'"num_attention_heads": {legal}', "num_attention_heads")
        share = self.rope.partial_rotary_factor
        if share not in (None, 1.0) and not self.PARTIAL:
            words = f"its partial_rotary_factor {share} changes the numbers and is not applied"
            raise _refusal(words, "1.0 alone", "rope_parameters")
        return self

    def spec(self, name: str) -> ModelSpec:
        """The architecture; raises SpecError where values do not go together."""
        rope = self.rope
        return ModelSpec(
            name=name,
            layers=self.num_hidden_layers,
            hidden=self.hidden_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
            vocab=self.vocab_size,
            activation="silu",
            tied_embeddings=self.tie_word_embeddings,
            norm_eps=self.rms_norm_eps,
            max_context=self.max_position_embeddings,
            window=self.window(),
            rope_theta=rope.rope_theta or self.rope_theta,
            rope_scaling=rope.scaling(self.max_position_embeddings, self.original_max_position_embeddings),
            rotary_dim=self.rotary_dim(),
            **self.more(),
        )

    @property
    def rope(self) -> Rope:
        """Rotary positions, wherever the config has them."""
        return self.rope_parameters or self.rope_scaling or Rope()

    def rotary_dim(self) -> int:
        """Rotated dimensions of a head; 0: all."""
        share = self.rope.partial_rotary_factor or self.partial_rotary_factor
        dim = self.head_dim or self.hidden_size // self.num_attention_heads
        return 0 if share == 1.0 else int(dim * share)

    def window(self) -> int:
        """Tokens that attention sees; 0: all."""
        return 0

    def more(self) -> dict[str, Any]:
        """Fields of the ModelSpec that differ between families."""
        return {"ffn": self.intermediate_size}


class _Windowed(Decoder):
    """Families whose last layers may see a window only (`max_window_layers` see everything)."""

    use_sliding_window: bool = False
    sliding_window: Annotated[int, Field(ge=0, le=10**8)] | None = 4096
    max_window_layers: Annotated[int, Field(ge=0, le=10**4)] = 28
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None

    def window(self) -> int:
        slides = self.layer_types is None or "sliding_attention" in self.layer_types
        some = self.layer_types is not None or self.max_window_layers < self.num_hidden_layers
        return (self.sliding_window or 0) if self.use_sliding_window and slides and some else 0


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


class Qwen2(_Windowed):
    """Qwen2 and Qwen2.5: biases on query, key and value."""

    ARCHITECTURE = "Qwen2ForCausalLM"
    num_key_value_heads: Size | None = 32
    max_position_embeddings: Size = 32768

    def more(self) -> dict[str, Any]:
        return {"ffn": self.intermediate_size, "qkv_bias": True}


class Qwen3(_Windowed):
    """Qwen3: norms of query and key."""

    ARCHITECTURE = "Qwen3ForCausalLM"
    num_key_value_heads: Size | None = 32
    head_dim: Size | None = 128
    max_position_embeddings: Size = 32768
    attention_bias: Off = False

    def more(self) -> dict[str, Any]:
        return {"ffn": self.intermediate_size, "qk_norm": True}


class Mixtral(Decoder):
    """Mixtral: every layer is a choice of experts."""

    ARCHITECTURE = "MixtralForCausalLM"
    num_key_value_heads: Size | None = 8
    max_position_embeddings: Size = 131072
    rms_norm_eps: Tiny = 1e-5
    rope_theta: Amount = 1e6
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


class _QwenExperts(_Windowed):
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
        return {
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


FAMILIES: dict[str, type[Decoder]] = {
    "llama": Llama,
    "mistral": Mistral,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "mixtral": Mixtral,
    "qwen2_moe": Qwen2Moe,
    "qwen3_moe": Qwen3Moe,
}
