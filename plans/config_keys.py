"""Keys and values of Hugging Face configs that several families have: what is inert, ranges, rotary positions."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

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
PositiveNumber = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]


def refusal(words: str, hint: str, key: str | None = None) -> PydanticCustomError:
    """What a validator raises; `key` is to blame where a rule joins several."""
    return PydanticCustomError(REFUSED, words, {"hint": hint, "key": key})


def only(*legal: Any) -> AfterValidator:
    """A validator that refuses every value but those that change nothing."""

    def check(value: Any) -> Any:
        if value not in legal:
            words = " or ".join("null" if v is None else str(v).lower() for v in legal)
            raise refusal("it changes the numbers and is not applied", f"{words} alone")
        return value

    return AfterValidator(check)


Off = Annotated[bool, only(False)]
NoDropout = Annotated[float, only(0.0)]
Whole = Annotated[float, only(1.0)]
Portion = Annotated[float, Field(gt=0, le=1)]
RopeType = Annotated[str, only("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su")]
Silu = Annotated[str, only("silu", "swish")]


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


Factors = Annotated[list[PositiveNumber], Field(min_length=1, max_length=4096)]
_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}


class Rope(Closed):
    """Rotary positions: `rope_parameters` of newer configs, `rope_scaling` of older ones."""

    rope_type: RopeType | None = None
    type: RopeType | None = None
    rope_theta: PositiveNumber | None = None
    factor: PositiveNumber | None = None
    low_freq_factor: PositiveNumber | None = None
    high_freq_factor: PositiveNumber | None = None
    original_max_position_embeddings: Size | None = None
    partial_rotary_factor: Portion | None = None
    attention_factor: PositiveNumber | None = None
    beta_fast: PositiveNumber | None = None
    beta_slow: PositiveNumber | None = None
    mscale: PositiveNumber | None = None
    mscale_all_dim: PositiveNumber | None = None
    truncate: bool | None = None
    short_factor: Factors | None = None
    long_factor: Factors | None = None

    @model_validator(mode="after")
    def _complete(self) -> Rope:
        missing = [key for key in _NEEDS.get(self.kind, ()) if getattr(self, key) is None]
        if missing:
            raise refusal(f"a {self.kind} scaling lacks " + ", ".join(missing), f'add "{missing[0]}"')
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
                loud = math.sqrt(1 + math.log(factor) / math.log(first)) if factor > 1 < first else 1.0
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
