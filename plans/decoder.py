"""What the records of Hugging Face families have in common (`plans.families`): decoders, and those with windows."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from plans.config_keys import (
    Closed,
    Layers,
    NoDropout,
    Off,
    PositiveNumber,
    Rope,
    Silu,
    Size,
    Tiny,
    Whole,
    refusal,
)
from plans.model import ModelSpec


class Decoder(Closed):
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
    rope_theta: PositiveNumber = 10000.0
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
            raise refusal(words, f'"num_key_value_heads": {math.gcd(heads, groups)}', "num_key_value_heads")
        if not self.head_dim and self.hidden_size % heads:
            words = f"it must divide hidden_size {self.hidden_size}"
            legal = math.gcd(heads, self.hidden_size)
            raise refusal(words, f'"num_attention_heads": {legal}', "num_attention_heads")
        share = self.rope.partial_rotary_factor
        if share not in (None, 1.0) and not self.PARTIAL:
            words = f"its partial_rotary_factor {share} changes the numbers and is not applied"
            raise refusal(words, "1.0 alone", "rope_parameters")
        return self

    def spec(self, name: str) -> ModelSpec:
        """The architecture; raises SpecError where values do not go together."""
        rope = self.rope
        fields: dict[str, Any] = {
            "name": name,
            "layers": self.num_hidden_layers,
            "hidden": self.hidden_size,
            "heads": self.num_attention_heads,
            "kv_heads": self.num_key_value_heads or self.num_attention_heads,
            "head_dim": self.head_dim or self.hidden_size // self.num_attention_heads,
            "vocab": self.vocab_size,
            "activation": "silu",
            "tied_embeddings": self.tie_word_embeddings,
            "norm_eps": self.rms_norm_eps,
            "max_context": self.max_position_embeddings,
            "window": self.window(),
            "rope_theta": rope.rope_theta or self.rope_theta,
            "rope_scaling": rope.scaling(self.max_position_embeddings, self.original_max_position_embeddings),
            "rotary_dim": self.rotary_dim(),
        }
        return ModelSpec(**(fields | self.more()))

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


class Windowed(Decoder):
    """Families whose last layers may see a window only (`max_window_layers` see everything)."""

    use_sliding_window: bool = False
    sliding_window: Annotated[int, Field(ge=0, le=10**8)] | None = 4096
    max_window_layers: Annotated[int, Field(ge=0, le=10**4)] = 28
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None

    @model_validator(mode="after")
    def _known_layers(self) -> Windowed:
        full = min(self.max_window_layers, self.num_hidden_layers)
        slides = ["full_attention"] * full + ["sliding_attention"] * (self.num_hidden_layers - full)
        if self.use_sliding_window and "sliding_attention" in (self.layer_types or ()) and self.layer_types != slides:
            words = "windows in other layers than those from max_window_layers on are not applied"
            raise refusal(words, "leave it out", "layer_types")
        return self

    def window(self) -> int:
        some = self.max_window_layers < self.num_hidden_layers
        slides = self.layer_types is None or "sliding_attention" in self.layer_types
        return (self.sliding_window or 0) if self.use_sliding_window and some and slides else 0

    def more(self) -> dict[str, Any]:
        return super().more() | ({"full_first": self.max_window_layers} if self.window() else {})
