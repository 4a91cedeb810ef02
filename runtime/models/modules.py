"""Modules that Megatron's layers are assembled from: rotary embedding, attention, value head.

They enter through Megatron's `ModuleSpec`, in place of Transformer Engine's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plans.model import ModelSpec
from runtime.models.context_parallel import CutRuns
from runtime.models.mcore import (
    AttnMaskType,
    RotaryEmbedding,
    SelfAttention,
    TransformerLayer,
    gather_from_sequence_parallel_region,
    get_transformer_layer_offset,
)
from runtime.models.norms import mark, normed
from runtime.models.packed_attention import Runs, Sight, packed_attention
from runtime.models.rope import amplitude, frequencies, local_rope


class NumberedLayer(TransformerLayer):  # type: ignore[misc]
    """Megatron's layer, numbered by the layout: Megatron itself counts as if all stages had equally many layers."""

    def __init__(
        self,
        config: Any,
        submodules: Any,
        *,
        layer_number: int,
        first: int,
        vp_stage: Any,
        pg_collection: Any,
        **_: Any,
    ) -> None:
        added = get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        super().__init__(
            config,
            submodules,
            layer_number=first + layer_number - added,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )

    def forward(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        """Megatron's, whose router knows the tokens. Recomputation comes here too, with those of its micro-batch."""
        router = getattr(self.mlp, "router", None)
        if router is not None:
            router.tokens = None if packed_seq_params is None else packed_seq_params.routed
            router.replayed = None if packed_seq_params is None else packed_seq_params.replayed
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


class Rotary(RotaryEmbedding):  # type: ignore[misc]
    """Rotary embedding with the constants of a `ModelSpec`.

    Megatron's own caches its tables for all models at once and so hands tables made under inference mode to training.
    """

    def __init__(self, spec: ModelSpec, config: Any, groups: Any) -> None:
        super().__init__(kv_channels=spec.rotated, rotary_percent=1.0, rotary_base=spec.rope_theta, cp_group=groups.cp)
        self.inv_freq: Tensor = frequencies(spec, self.inv_freq.device)
        self.amplitude = amplitude(spec)
        self._table: Tensor | None = None
        self.local = Rotary(local, config, groups) if (local := local_rope(spec)) else None

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """Angles [max_seq_len, 1, 1, rotated dimensions], float32."""
        if self._table is None or self._table.shape[0] < max_seq_len + offset:
            with torch.inference_mode(False):
                self._table = self.get_emb(max_seq_len + offset)
        return self._table[offset : offset + max_seq_len]

    def rotation(self, positions: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
        """Cosine and signed sine, negative in the first half, of the rotated dimensions at positions [tokens] below
        `longest`: [2, tokens, 1, 1, rotated]; behind them those of layers with a window, where they have their own."""
        angles = self(max(longest, 1))[..., : self.inv_freq.shape[0]][positions]
        cos, sin = angles.cos(), angles.sin()
        own = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).mul_(self.amplitude).to(dtype)
        return own if self.local is None else torch.cat([own, self.local.rotation(positions, longest, dtype)])


class Attention(nn.Module):
    """The attention core on torch's fused kernels: [s, b, heads, dim] queries on [t, b, kv_heads, dim] keys, or packed
    [tokens, heads, dim] with `Runs`, or with `CutRuns` where the tokens of a pack are cut over ranks.

    `attention_mask` follows Megatron: True is masked out, broadcastable to [b, 1, s, t]. None means causal, or no mask
    where the call says `no_mask` (decoding one token).
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        *,
        spec: ModelSpec,
        **_: Any,
    ) -> None:
        super().__init__()
        assert softmax_scale is None
        self.attn_mask_type = attn_mask_type
        self.sight = Sight.of(spec, layer_number - 1)
        self.groups = pg_collection

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        assert attention_bias is None
        if isinstance(packed_seq_params, CutRuns):
            cut, group = packed_seq_params, self.groups.cp
            key, value = cut.gathered(key, group), cut.gathered(value, group)
            return packed_attention(query, key, value, cut.of_queries, cut.of_keys, self.sight)
        if packed_seq_params is not None:
            return packed_attention(query, key, value, packed_seq_params, packed_seq_params, self.sight)
        if self.sight.window or self.sight.cap:
            assert attention_mask is None and len(key) == len(query)
            return self._as_packed(query, key, value)
        causal = attention_mask is None and (attn_mask_type or self.attn_mask_type) != AttnMaskType.no_mask
        return self._rectangular(query, key, value, attention_mask, causal=causal)

    def _as_packed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Sequences of one length as a pack, whose kernels know windows and caps."""
        tokens, batch, heads, dim = query.shape
        runs = Runs.of((tokens,) * batch, query.device)
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        out = packed_attention(q, k, v, runs, runs, self.sight)
        return out.view(batch, tokens, heads * dim).transpose(0, 1)

    def _rectangular(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
        """Queries on keys of as many sequences, under a mask or a causal one."""
        tokens, batch, heads, dim = query.shape
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        share = heads // k.shape[1]
        # CUDA's fused kernels take a mask or shared keys, not both. A single token's queries that share a key stand in
        # the place of positions; for more tokens the keys are repeated.
        if tokens == 1:
            q = q.reshape(batch, k.shape[1], share, dim)
        elif share > 1 and mask is not None:
            k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask is None else ~mask,
            is_causal=causal and tokens > 1,
            scale=self.sight.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.reshape(batch, heads, tokens, dim).permute(2, 0, 1, 3).reshape(tokens, batch, heads * dim)


class PackedSelfAttention(SelfAttention):  # type: ignore[misc]
    """Megatron's self attention with the rotations that it is given as `Rotary.rotation`, those of the positions
    of the tokens in their sequences. Megatron lets this hook change queries and keys before the attention core.

    post_norm: makes a norm of what attention adds to the residual.
    """

    def __init__(self, config: Any, *args: Any, spec: ModelSpec, post_norm: Any = None, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.local = bool(spec.local_rope_theta and spec.window_of(self.layer_number - 1))
        if post_norm is not None:
            self.post_norm = post_norm(config, config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return normed(self, super().forward(*args, **kwargs))

    def _adjust_key_value_for_inference(
        self, inference_context: None, query: Tensor, key: Tensor, value: Tensor, rotary_pos_emb: Any, *_: Any
    ) -> tuple[Any, ...]:
        rotation = rotary_pos_emb[0][2:] if self.local else rotary_pos_emb[0][:2]
        query, key = (_Rotate.apply(x, rotation) for x in (query, key))  # type: ignore[no-untyped-call]
        return query, key, value, None, self.attn_mask_type, None


class _Rotate(torch.autograd.Function):
    """Rotate pairs (x[i], x[i + rotated / 2]) of the first `rotated` of [..., dim] by angles given as
    `Rotary.rotation`. Keeps no activation; the gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        return _rotated(x, rotation, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _rotated(grad, ctx.saved_tensors[0], -1), None


def _rotated(x: Tensor, rotation: Tensor, sense: int) -> Tensor:
    cos, sin = rotation
    width = cos.shape[-1]
    turned = x[..., :width]
    # Half a turn brings the other of a pair to the place of each; the sine has the sign that it needs there.
    swapped = turned.roll(width // 2, -1)
    if width == x.shape[-1]:
        return torch.mul(x, cos).addcmul_(swapped, sin, value=sense)
    out = x.clone(memory_format=torch.contiguous_format)
    out[..., :width].mul_(cos).addcmul_(swapped, sin, value=sense)
    return out


class ValueHead(nn.Module):
    """One scalar per token, in the place of Megatron's output layer: [s, b, hidden] -> ([s, b, 1] float32, None).

    Replicated over tp. Under sequence parallel each rank scores its part of the sequence, and the scalars are gathered.
    """

    def __init__(self, config: Any, tp_group: Any) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.sequence_parallel = config.sequence_parallel
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        mark(self.weight, config.sequence_parallel)

    def forward(self, x: Tensor, weight: Any = None, runtime_gather_output: Any = None) -> tuple[Tensor, None]:
        values = F.linear(x, self.weight).float()
        if self.sequence_parallel:
            values = gather_from_sequence_parallel_region(
                values, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return values, None
