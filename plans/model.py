"""ModelSpec: the architecture of a decoder-only transformer, and how many parameters it has.

Knows nothing of layouts or of time. Parameter counts follow the published architectures; the library
(`library/models.json`) and any Hugging Face `config.json` give the same type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from plans.errors import SpecError
from plans.lora import Lora
from plans.rope import LongRopeScaling, RopeScaling, YarnScaling

MOST_EXPERTS = 200_000


class Norm(StrEnum):
    """Normalisation: RMSNorm (a weight) or LayerNorm (a weight and a bias)."""

    RMS = "rms"
    LAYER = "layer"


class Position(StrEnum):
    """How a token learns its place; only `learned` has parameters."""

    ROPE = "rope"
    LEARNED = "learned"
    ALIBI = "alibi"


class Head(StrEnum):
    """What sits on the last layer: a vocabulary projection, or one scalar per token (critic, reward)."""

    LM = "lm"
    VALUE = "value"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Architecture of one model.

    `ffn` is the inner width of one MLP (of one expert where `experts` > 0); `head_dim` may differ from
    hidden / heads (Gemma, Qwen3). `linear_bias` means biases on every linear of the block (GPT-2, GPT-3, BLOOM).
    `window`: tokens that attention sees, 0 for all; no longer sequence is computed rightly without it.
    `family`: the Hugging Face `model_type` where the names of the weights follow from it, empty for families that are
    told apart by what they have (Llama, Mistral, Mixtral, Qwen).
    `rotary_dim`: the first dimensions of a head, which rotary positions turn, 0 for all.
    `norms_per_layer` counts the norms over the hidden width in one block: before attention and MLP, after them
    (`post_norms`; OLMo 2), or both (four; Gemma 2 and 3, GLM-4). `norm_offset`: a norm multiplies by 1 + its weight.
    `window` holds in all layers but the first `full_first` and every `full_every`-th (Gemma 2 and 3: 2 and 6); layers
    with it have a rope theta of their own where `local_rope_theta` is not 0, unscaled (Gemma 3).
    Scores of attention are divided by the root of `query_scalar` (0: head_dim), and bounded softly by `attention_cap`,
    logits by `logit_cap`: cap x tanh(x / cap), 0 for none (Gemma 2). `embedding_scale` multiplies embeddings.
    `wide_qk_norm`: the norms of query and key are over all heads together (OLMo 2), not over each.
    A token goes to `experts_per_token` of `experts`, weighted by their gates: a softmax over all experts, of which the
    chosen ones are scaled to a sum of 1 (`normalize_gates`; Mixtral, Qwen3) or kept as they are (Qwen1.5 and Qwen2).
    `shared_ffn` is the width of an expert that every token visits, weighted by a gate of its own (`shared_gate`; Qwen)
    or added as it is (DeepSeek, Llama 4). The first `dense_first` layers, and those whose number from 1 is no multiple
    of `experts_every`, have one MLP of the width `dense_ffn` instead of experts.
    Latent attention (`kv_rank` above 0; DeepSeek-V2, arXiv:2405.04434, 2.1) makes keys and values out of kv_rank
    numbers per token, and one key of `rotary_dim` numbers with positions that all heads share: generation caches both.
    Queries come out of `q_rank` numbers (0: of the hidden state). Values have `value_dim` numbers a head (0: head_dim).
    `sinks`: each head has a learned score that takes a part of the attention (GPT-OSS).
    `lora`: the adapters that are trained in the place of the weights, which are frozen then; they are not among the
    parameters that are counted here.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated_mlp: bool = True
    activation: str = "silu"
    tied_embeddings: bool = False
    norm: Norm = Norm.RMS
    norm_eps: float = 1e-5
    norms_per_layer: int = 2
    post_norms: bool = False
    norm_offset: bool = False
    position: Position = Position.ROPE
    max_context: int = 4096
    window: int = 0
    full_first: int = 0
    full_every: int = 0
    local_rope_theta: float = 0.0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_dim: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False
    wide_qk_norm: bool = False
    query_scalar: float = 0.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    embedding_scale: float = 1.0
    linear_bias: bool = False
    experts: int = 0
    experts_per_token: int = 0
    normalize_gates: bool = True
    shared_ffn: int = 0
    shared_gate: bool = True
    dense_first: int = 0
    dense_ffn: int = 0
    experts_every: int = 1
    q_rank: int = 0
    kv_rank: int = 0
    value_dim: int = 0
    sinks: bool = False
    head: Head = Head.LM
    family: str = ""
    lora: Lora | None = None

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "max_context"):
            value = getattr(self, field)
            if not isinstance(value, int) or value <= 0:
                raise SpecError(f"model `{self.name}`: {field} is {value!r}; it must be a positive whole number")
        if self.heads % self.kv_heads:
            raise SpecError(
                f"model `{self.name}`: heads {self.heads} must be a multiple of kv_heads {self.kv_heads}",
                f"kv_heads {math.gcd(self.heads, self.kv_heads)}, for example",
            )
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise SpecError(
                f"model `{self.name}`: rotary_dim is {self.rotary_dim}; it must be even, and {self.head_dim} at most",
                f"rotary_dim {max(0, min(self.rotary_dim, self.head_dim)) // 2 * 2}, for example",
            )
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1:
            raise SpecError(f"model `{self.name}`: rope_theta is {self.rope_theta}; a yarn scaling needs more than 1")
        if isinstance(self.rope_scaling, LongRopeScaling):
            self._check_pairs(self.rope_scaling)
        if self.layers * self.experts > MOST_EXPERTS:
            raise SpecError(
                f"model `{self.name}`: {self.layers} x {self.experts} experts; {MOST_EXPERTS:,} at most",
                f"experts {MOST_EXPERTS // self.layers}, for example",
            )
        if self.experts_per_token > self.experts:
            raise SpecError(
                f"model `{self.name}`: experts_per_token {self.experts_per_token} exceeds experts {self.experts}"
            )

        if self.expert_layers < self.layers and self.experts and not self.dense_ffn:
            raise SpecError(
                f"model `{self.name}`: layers without experts need a dense_ffn", "dense_ffn 4096, for example"
            )
        if self.kv_rank and not self.rotary_dim:
            raise SpecError(f"model `{self.name}`: latent attention needs a rotary_dim", "rotary_dim 64, for example")
        if self.lora is not None:
            self._check_lora(self.lora)

    def _check_lora(self, lora: Lora) -> None:
        what = "experts" if self.experts else "latent attention" if self.kv_rank else ""
        if what:
            raise SpecError(f"lora: model `{self.name}` has {what}, whose weights take no adapters", "a dense model")
        if self.head is Head.VALUE:
            raise SpecError(f"lora: model `{self.name}` has a value head; only language models have adapters")
        if lora.rank > self.hidden:
            hint = f"rank {min(16, self.hidden)}, for example"
            raise SpecError(f"lora: rank {lora.rank} is more than the hidden width {self.hidden} of {self.name}", hint)

    def _check_pairs(self, scaling: LongRopeScaling) -> None:
        for name in ("short_factor", "long_factor"):
            if len(getattr(scaling, name)) != self.rotated // 2:
                raise SpecError(
                    f"model `{self.name}`: {len(getattr(scaling, name))} numbers in {name}"
                    f" for {self.rotated // 2} pairs of rotated dimensions"
                )

    @property
    def rotated(self) -> int:
        """Dimensions of a head that rotary positions turn."""
        return self.rotary_dim or self.head_dim

    @property
    def norms_before(self) -> bool:
        """Whether a norm stands before attention and one before the MLP."""
        return self.norms_per_layer == 4 or not self.post_norms

    @property
    def norms_after(self) -> bool:
        """Whether a norm stands after attention and one after the MLP."""
        return self.norms_per_layer == 4 or self.post_norms

    def window_of(self, layer: int) -> int:
        """Tokens that attention sees in a layer (from 0); 0: all."""
        everything = layer < self.full_first or (self.full_every and (layer + 1) % self.full_every == 0)
        return 0 if everything else self.window

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding as stored: the next multiple of 128, Megatron's `make_vocab_size_divisible_by`."""
        return -(-self.vocab // 128) * 128

    @property
    def qkv_width(self) -> int:
        """Output width of the fused query-key-value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def norm_params(self) -> int:
        """Parameters of one norm over the hidden width."""
        return self.hidden * (2 if self.norm is Norm.LAYER else 1)

    @property
    def value_width(self) -> int:
        """Numbers of a head's value."""
        return self.value_dim or self.head_dim

    @property
    def key_value_width(self) -> int:
        """Numbers per token of a block's keys and values, before tensor parallelism cuts them."""
        return self.kv_heads * (self.head_dim + self.value_width)

    @property
    def latent_width(self) -> int:
        """Numbers per token that a block with latent attention caches, whole on every tp rank; 0 for others."""
        return self.kv_rank + self.rotary_dim if self.kv_rank else 0

    def has_experts(self, layer: int) -> bool:
        """Whether a layer (from 0) is a choice of experts."""
        return bool(self.experts) and layer >= self.dense_first and (layer + 1) % self.experts_every == 0

    @property
    def expert_layers(self) -> int:
        """Layers that are a choice of experts."""
        if not self.experts:
            return 0
        return self.layers // self.experts_every - min(self.dense_first, self.layers) // self.experts_every

    @property
    def cut_widths(self) -> tuple[int, ...]:
        """Widths of the MLPs that tensor parallelism cuts; experts are never cut."""
        if not self.experts:
            return (self.ffn,)
        return tuple(width for width in (self.shared_ffn, self.dense_ffn) if width)

    @property
    def attention_params(self) -> int:
        """Parameters of one attention block without its norms over the hidden width."""
        if self.kv_rank:
            return self._latent_params
        weights = self.hidden * self.qkv_width + self.heads * self.head_dim * self.hidden
        bias = self.qkv_width * (self.qkv_bias or self.linear_bias) + self.hidden * self.linear_bias
        normed = self.heads + self.kv_heads if self.wide_qk_norm else 2
        return weights + bias + normed * self.head_dim * self.qk_norm + self.heads * self.sinks

    @property
    def _latent_params(self) -> int:
        queries = self.heads * self.head_dim
        down = self.hidden * self.q_rank + self.q_rank if self.q_rank else 0
        up = (self.q_rank or self.hidden) * queries
        compressed = self.hidden * self.latent_width + self.kv_rank
        expanded = self.kv_rank * self.heads * (self.head_dim - self.rotary_dim + self.value_width)
        return down + up + compressed + expanded + self.heads * self.value_width * self.hidden

    def _one_mlp(self, width: int) -> int:
        per_width = (3 if self.gated_mlp else 2) * self.hidden
        return per_width * width + (width * (2 if self.gated_mlp else 1) + self.hidden) * self.linear_bias

    @property
    def expert_params(self) -> int:
        """Parameters of one expert."""
        return self._one_mlp(self.ffn)

    @property
    def mlp_params(self) -> int:
        """Parameters of one MLP block: every expert, the shared expert and the router."""
        if not self.experts:
            return self._one_mlp(self.ffn)
        shared = self._one_mlp(self.shared_ffn) + self.hidden * self.shared_gate if self.shared_ffn else 0
        router = self.experts * (self.hidden + self.linear_bias)
        return self.experts * self.expert_params + shared + router

    @property
    def layer_params(self) -> int:
        """Parameters of one transformer block; of one with experts, where the model has some."""
        return self.attention_params + self.mlp_params + self.norms_per_layer * self.norm_params

    @property
    def blocks_params(self) -> int:
        """Parameters of all transformer blocks."""
        dense = self.layers - self.expert_layers if self.experts else 0
        return self.layers * self.layer_params - dense * (self.mlp_params - self._one_mlp(self.dense_ffn))

    @property
    def embedding_params(self) -> int:
        """Parameters of the input embedding, without padding of the vocabulary."""
        return self.vocab * self.hidden + (self.max_context * self.hidden if self.position is Position.LEARNED else 0)

    @property
    def head_params(self) -> int:
        """Parameters of the output head that are not shared with the embedding."""
        if self.head is Head.VALUE:
            return self.hidden
        return 0 if self.tied_embeddings else self.vocab * self.hidden

    @property
    def params(self) -> int:
        """All parameters."""
        return self.embedding_params + self.blocks_params + self.norm_params + self.head_params

    def with_value_head(self) -> ModelSpec:
        """The same body with one scalar per token, as critic and reward models have."""
        return replace(self, head=Head.VALUE, tied_embeddings=False, lora=None)

    @property
    def base(self) -> ModelSpec:
        """The model without adapters."""
        return replace(self, lora=None) if self.lora else self
