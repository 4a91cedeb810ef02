"""Bytes of one transformer block that a training step stores or makes, per token of a rank.

Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4, written out by
tensor, so that grouped-query attention, gated MLPs, flash attention and experts fall out of the same list.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cost_models.candidates import FULL_RECOMPUTE, NO_RECOMPUTE, Array
from cost_models.memory.training_case import OPERATOR_RECOMPUTE, TrainingCase
from plans.model import ModelSpec, Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWidths:
    """Elements per token that one block stores for its backward pass, without recomputation.

    stream: along the hidden width, whole on every tp rank unless sequence parallel cuts them (inputs and outputs of the
    norms). cut: shared out over tp (query, key, value, attention output, both sides of the activation function).
    heads: attention heads, for the score matrix of unfused attention and the fp32 row statistics of flash attention.
    keys: keys and values. hidden: the residual stream. mlp: intermediate results of the MLP. norm_bytes: temporaries of
    a norm, bytes per token, whole on every tp rank. adapters: what LoRA's linears keep between their two thin products,
    whole on every tp rank.
    """

    stream: float
    cut: float
    heads: float
    keys: float
    hidden: float
    mlp: float
    norm_bytes: float
    adapters: float = 0.0


def block_widths(spec: ModelSpec, *, fused_pointwise: bool, fused_rotary: bool, element: float = 2.0) -> BlockWidths:
    """Widths of a block of `spec` in a precision of `element` bytes.

    A fused norm stores input and output; RMSNorm in plain PyTorch also the normalised input, and its input in fp32.
    An unfused SwiGLU also stores silu(gate) and the shifted other half (Megatron's `glu_linear_offset`); a rotary
    embedding that is not part of attention keeps the projection (the values are a view of it) beside the rotated query
    and key. Experts see
    `experts_per_token` copies of each token (balanced routing) and store the permuted input and the output of each; the
    shared expert is one more MLP.
    """
    gates = 2 if spec.gated_mlp else 1
    stored = gates + 1 + 2 * (spec.gated_mlp and not fused_pointwise)
    mlp = float(stored * spec.ffn)
    plain_norm = not fused_pointwise and spec.norm is Norm.RMS
    norm = 2.0 + (4.0 / element if plain_norm else 0.0)
    widest = mlp
    if spec.experts:
        sparse = spec.expert_layers / spec.layers
        mlp = spec.experts_per_token * (mlp + 2.0 * spec.hidden) + stored * spec.shared_ffn
        widest = max(mlp, float(stored * spec.dense_ffn))
        mlp = mlp * sparse + stored * spec.dense_ffn * (1.0 - sparse)
    return BlockWidths(
        stream=norm * spec.norms_per_layer * spec.hidden,
        cut=_attention_width(spec, fused_rotary=fused_rotary) + mlp,
        heads=float(spec.heads),
        keys=float(spec.key_value_width),
        hidden=float(spec.hidden),
        mlp=widest,
        norm_bytes=_norm_bytes(spec, element, plain=plain_norm),
        adapters=float(spec.lora.rank * len(spec.lora.targets)) if spec.lora else 0.0,
    )


def _attention_width(spec: ModelSpec, *, fused_rotary: bool) -> int:
    """Elements per token that attention stores. Latent attention: both projections down and their norms, query, key,
    the joint key-value that the values are a view of, and the output."""
    if spec.kv_rank:
        ranks = 2 * (spec.q_rank + spec.kv_rank) + spec.rotary_dim
        joint = spec.heads * (spec.head_dim - spec.rotary_dim + 2 * spec.value_width)
        return ranks + 2 * spec.heads * spec.head_dim + joint
    rotated = 0 if fused_rotary else (spec.heads + spec.kv_heads) * spec.head_dim
    return spec.qkv_width + rotated + spec.heads * spec.head_dim


def _norm_bytes(spec: ModelSpec, element: float, *, plain: bool) -> float:
    """A fused norm works in place of three streams; plain PyTorch holds three in fp32 beside the result."""
    return spec.hidden * (12.0 + element if plain and element < 4 else 3.0 * element)


def stored_block_bytes(widths: BlockWidths, case: TrainingCase, scores: Array, *, gathers_keys: bool) -> Array:
    """Bytes per token that a block stores without recomputation.

    scores: keys that each query keeps in an unfused attention (the sequence length); 0 for flash attention, which
    keeps one fp32 statistic per head instead. With dropout this is equation 2 of the paper, 34 sbh + 5 as^2b at tp 1
    (masks are one byte; the softmax output, its mask and the dropped output make the 5); without dropout the softmax
    output alone stays. Context parallelism gathers the keys and values of the other ranks (`gathers_keys`), or
    exchanges heads for tokens and then stores the attention output on both sides of the exchange.
    """
    element, along = case.element, np.where(case.sequence_parallel, case.tp, 1.0)
    masks = 2.0 * widths.hidden * case.dropout
    softmax = widths.heads * scores * (2.0 * element + 1.0 if case.dropout else element)
    core = np.where(scores > 0, softmax, 4.0 * widths.heads)
    context = (case.cp - 1.0) * widths.keys if gathers_keys else np.where(case.cp > 1, widths.hidden, 0.0)
    whole = widths.adapters * element
    return (widths.stream * element + masks) / along + ((widths.cut + context) * element + core) / case.tp + whole


def kept_block_bytes(widths: BlockWidths, case: TrainingCase, *, gathers_keys: bool) -> Array:
    """Bytes per token that a block keeps until its backward pass: all, all but the attention core, or its input only.

    Selective recomputation drops the score matrix (section 5 of the paper); the query, key and value that it starts
    from stay. Full recomputation keeps 2 sbh.
    """
    selective = stored_block_bytes(widths, case, np.zeros_like(case.tp), gathers_keys=gathers_keys)
    none = selective if case.flash else stored_block_bytes(widths, case, case.scores, gathers_keys=gathers_keys)
    full = widths.hidden * case.element / np.where(case.sequence_parallel, case.tp, 1.0)
    halves = full + 0.5 * widths.cut * case.element / case.tp
    kept = np.where(case.recompute == NO_RECOMPUTE, none, selective)
    kept = np.where(case.recompute == OPERATOR_RECOMPUTE, halves, kept)
    return np.where(case.recompute == FULL_RECOMPUTE, full, kept)


def backward_block_bytes(widths: BlockWidths, case: TrainingCase) -> Array:
    """Temporaries per token of the fullest part of a block's backward pass: the MLP (gradients of its output and input
    and of all that it stored in between) or a norm."""
    norm = widths.norm_bytes / np.where(case.sequence_parallel, case.tp, 1.0)
    return np.maximum(case.element * (2.0 * widths.hidden + widths.mlp / case.tp), norm)


def forward_block_bytes(spec: ModelSpec, element: float, tp: Array, *, fused_pointwise: bool) -> Array:
    """Bytes per token alive at once in a forward pass without gradients: the residual and a norm's temporaries, or
    residual, norm output and the wider of attention (projection, rotated copies, output) and MLP (all its steps)."""
    widths = block_widths(spec, fused_pointwise=fused_pointwise, fused_rotary=False, element=element)
    attention = 2.0 * (spec.heads * spec.head_dim + spec.key_value_width) + spec.heads * spec.value_width
    inner = element * (2.0 * spec.hidden + max(attention, widths.mlp) / tp)
    return np.maximum(inner, element * spec.hidden + widths.norm_bytes)
