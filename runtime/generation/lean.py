"""A stage's forward pass over a model's own weights without Megatron's Python: what generation computes with.

Hidden states are [tokens, hidden]; which sequence a token belongs to is the business of the attention that the caller
passes in, so that packed prompts and single tokens of many slots take the same path. Norms are the modules' own, so
that both forwards have one arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from runtime.generation.experts import expert_block
from runtime.generation.products import Product, product_with
from runtime.models.architecture import embedding_scale
from runtime.models.lora import adapter_of
from runtime.models.model import Model
from runtime.passes.logprobs import capped_

Adapter = Callable[[Tensor, Tensor], Tensor]
"""(out, x) -> out + the product of a linear's adapter with x, in place (`adapter_of`)."""
Attend = Callable[[int, Tensor], Tensor]
"""(local layer, queries with keys and values [tokens, kv_heads / tp, share + 2, dim], rotated) -> attention outputs
[tokens, heads / tp x dim]. Of each kv head's `share + 2` vectors the last two are its key and its value."""

LayerNote = Callable[[int, Tensor], None]
"""(local layer, the experts that each token visits [tokens, k])."""


@dataclass(frozen=True, eq=False)
class _Block:
    """Weights of one transformer block as functions and tensors."""

    input_norm: Callable[[Tensor], Tensor] | None
    query_norm: Callable[[Tensor], Tensor] | None
    key_norm: Callable[[Tensor], Tensor] | None
    attention_norm: Callable[[Tensor], Tensor] | None
    mlp_norm: Callable[[Tensor], Tensor] | None
    local: bool
    qkv: Product
    qkv_bias: Tensor | None
    qkv_adapter: Adapter
    out: Product
    out_bias: Tensor | None
    out_adapter: Adapter
    mlp: Callable[..., Tensor]


class LeanStage:
    """This rank's stage of a model. Sees the weights as they stand at each call: make it anew after they have moved."""

    def __init__(self, model: Model, steps: float = 0) -> None:
        """`steps`: calls that are to come, to which weights may be fitted."""
        assert len(model.chunks) == 1 and not model.config.sequence_parallel, "generation has its own layout"
        self.model, spec, tp = model, model.spec, model.layout.tp
        self._steps = steps
        self._group = model.groups.tp if tp > 1 else None
        self.kv_heads, self.share, self.dim = spec.kv_heads // tp, spec.heads // spec.kv_heads, spec.head_dim
        self.rotated = spec.rotated
        self.scale = embedding_scale(spec, model.config.params_dtype)
        self._chunk: Any = model.chunks[0]
        self.blocks = [self._block(layer) for layer in self._chunk.decoder.layers]
        self.sights = [layer.self_attention.core_attention.sight for layer in self._chunk.decoder.layers]
        self._head = self._product(self._vocabulary()) if model.last_stage else None

    def _block(self, layer: Any) -> _Block:
        attention, spec = layer.self_attention, self.model.spec
        normed, before = spec.qk_norm, spec.norms_before
        return _Block(
            input_norm=layer.input_layernorm.forward if before else None,
            query_norm=attention.q_layernorm.forward if normed else None,
            key_norm=attention.k_layernorm.forward if normed else None,
            attention_norm=attention.post_norm.forward if spec.norms_after else None,
            mlp_norm=layer.pre_mlp_layernorm.forward if before else None,
            local=attention.local,
            qkv=self._product(attention.linear_qkv.weight),
            qkv_bias=attention.linear_qkv.bias,
            qkv_adapter=adapter_of(attention.linear_qkv),
            out=self._product(attention.linear_proj.weight),
            out_bias=attention.linear_proj.bias,
            out_adapter=adapter_of(attention.linear_proj),
            mlp=self._mlp(layer.mlp),
        )

    def _mlp(self, mlp: Any) -> Callable[..., Tensor]:
        """(residual, normed, note, rows) -> residual + the block's MLP; experts tell `note` which of them were chosen,
        and `rows` tells them how many tokens other replicas have."""
        if self.model.spec.experts:
            return expert_block(self.model, mlp, self._sum)
        first, second, config = mlp.linear_fc1, mlp.linear_fc2, self.model.config
        activation, gated, join = config.activation_func, config.gated_linear_unit, self._join
        norm = mlp.post_norm.forward if self.model.spec.norms_after else None
        widen, narrow = adapter_of(first), adapter_of(second)
        wide, thin = self._product(first.weight), self._product(second.weight)

        def dense(residual: Tensor, x: Tensor, note: object = None, rows: int = 0) -> Tensor:
            inner = widen(wide(x, first.bias), x)
            if gated:
                gate, up = inner.chunk(2, -1)
                inner = activation(gate).mul_(up)
            else:
                inner = activation(inner)
            return join(residual, inner, thin, second.bias, narrow, norm)

        return dense

    def _join(
        self,
        residual: Tensor,
        x: Tensor,
        product: Product,
        bias: Tensor | None,
        adapter: Adapter,
        norm: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """residual + a row-parallel linear layer, or the norm of it. Ranks add their part of an adapter's product
        before the sum."""
        part = product(x, None)
        self._sum(adapter(part, x))
        if norm is not None:
            return norm(part if bias is None else part.add_(bias)) + residual
        out = part.add_(residual)
        return out if bias is None else out.add_(bias)

    def _product(self, weight: Tensor) -> Product:
        return product_with(weight, self._steps)

    def _sum(self, part: Tensor) -> None:
        """Sum over the tp ranks, in place."""
        if self._group is not None:
            dist.all_reduce(part, group=self._group)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [n, hidden] of token ids [n]; on the first stage."""
        weight = self._chunk.embedding.word_embeddings.weight
        if self._group is None:
            return self._scaled(F.embedding(tokens, weight))
        local = tokens - self._group.rank() * weight.shape[0]
        outside = (local < 0) | (local >= weight.shape[0])
        hidden = F.embedding(local.masked_fill_(outside, 0), weight).masked_fill_(outside[:, None], 0)
        dist.all_reduce(hidden, group=self._group)
        return self._scaled(hidden)

    def _scaled(self, embedded: Tensor) -> Tensor:
        return embedded if self.scale == 1.0 else embedded * self.scale

    def rotation(self, positions: int) -> Tensor:
        """Cosines and signed sines of positions [0, positions): [positions, 2, 1, 1, rotated], for `layers`; behind
        them those of layers with a window, where they have their own."""
        every = [rope for rope in (self._chunk.rotary_pos_emb, self._chunk.rotary_pos_emb.local) if rope is not None]
        return torch.cat([self._turns(rope, positions) for rope in every], 1)

    def _turns(self, rope: Any, positions: int) -> Tensor:
        angles = rope(positions)[:, 0]
        sign = torch.ones_like(angles)
        sign[..., : angles.shape[-1] // 2] = -1
        table = torch.stack([angles.cos(), angles.sin() * sign], 1) * rope.amplitude
        return torch.as_tensor(table[:, :, None].to(self.model.config.params_dtype))

    def layers(
        self,
        hidden: Tensor,
        rotation: Tensor,
        attend: Attend,
        note: LayerNote | None = None,
        rows: int = 0,
        keep: int | None = None,
    ) -> Tensor:
        """Hidden states [n, hidden] behind the blocks; `rotation` [n, 2 or 4, 1, 1, rotated]: the tokens' positions.
        `note` gets the experts that the tokens visit. `rows`: the most tokens that a replica has, where replicas share
        experts and have different numbers of them. `keep`: of how many tokens, the first ones, more is wanted of the
        last block than keys and values (None: of all); experts see all tokens all the same."""
        shape = (len(hidden), self.kv_heads, self.share + 2, self.dim)
        for index, block in enumerate(self.blocks):
            normed = hidden if block.input_norm is None else block.input_norm(hidden)
            qkv = block.qkv_adapter(block.qkv(normed, block.qkv_bias), normed).view(shape)
            cos, sin = rotation[:, 2 * block.local], rotation[:, 2 * block.local + 1]
            turned = qkv[:, :, : self.share + 1]
            if block.query_norm is not None and block.key_norm is not None:
                queries, keys = turned[:, :, : self.share], turned[:, :, self.share :]
                queries.copy_(block.query_norm(queries))
                keys.copy_(block.key_norm(keys))
            turned = turned[..., : self.rotated]
            if self.rotated == self.dim:  # values along, because a roll copies what is not contiguous first
                swapped = qkv.roll(self.rotated // 2, -1)[:, :, : self.share + 1]
            else:
                swapped = turned.roll(self.rotated // 2, -1)
            turned.mul_(cos).addcmul_(swapped, sin)
            attended, adapter = attend(index, qkv), block.out_adapter
            if keep is not None and index == len(self.blocks) - 1 and not self.model.spec.experts:
                if not keep:
                    return hidden[:0]
                hidden, attended = hidden[:keep], attended[:keep]
            hidden = self._join(hidden, attended, block.out, block.out_bias, adapter, block.attention_norm)
            normed = hidden if block.mlp_norm is None else block.mlp_norm(hidden)
            hidden = block.mlp(hidden, normed, None if note is None else partial(note, index), rows)
        return hidden

    def lend(self, rows: int) -> None:
        """Compute this rank's experts for up to `rows` tokens of each other replica that shares them, and nothing of
        its own: what `layers` there waits for."""
        nothing = torch.zeros(0, self.model.spec.hidden, dtype=self.model.config.params_dtype, device=self.model.device)
        for block in self.blocks:
            block.mlp(nothing, nothing, None, rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's part of the vocabulary, [n, padded vocabulary / tp]; on the last stage."""
        assert self._head is not None, "the last stage has the head"
        logits = self._head(self._chunk.decoder.final_layernorm.forward(hidden), None)
        return capped_(logits, self.model.spec.logit_cap) if self.model.spec.logit_cap else logits

    def _vocabulary(self) -> Tensor:
        tied, chunk = self.model.spec.tied_embeddings, self._chunk
        weight: Tensor = chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
        return weight
