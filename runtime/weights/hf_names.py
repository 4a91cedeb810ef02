"""Megatron's parameters in Hugging Face's terms: which tensors of a checkpoint make up a parameter, and back.

Llama, Mistral, Qwen2 and Qwen3 name their tensors alike; Mixtral has names of its own for experts. Megatron fuses
query, key and value group by group ([q..., k, v] for each kv head), and gate above up; Hugging Face keeps them apart,
or (`_FUSED`) stacks all queries, all keys and all values. A *part* is one of them, wherever it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from plans.layout import Parameter
from plans.model import Head, ModelSpec

SCORE = "score.weight"
_QKV = "self_attention.linear_qkv"
_LAYER = {
    _QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "self_attention.q_layernorm": ("self_attn.q_norm",),
    "self_attention.k_layernorm": ("self_attn.k_norm",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
    "input_layernorm": ("input_layernorm",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "mlp.router": ("mlp.gate",),
    "mlp.shared_experts.linear_fc1": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "mlp.shared_experts.linear_fc2": ("mlp.shared_expert.down_proj",),
}
_GATE_UP = {"mlp.linear_fc1": "mlp.gate_up_proj"}
_FUSED = {"phi3": {_QKV: "self_attn.qkv_proj", **_GATE_UP}, "glm": _GATE_UP, "glm4": _GATE_UP}
"""Families whose checkpoints keep the parts of a parameter in one tensor, one above the other."""
_GEMMA2_NORMS = {
    "self_attention.post_norm": ("post_attention_layernorm",),
    "pre_mlp_layernorm": ("pre_feedforward_layernorm",),
    "mlp.post_norm": ("post_feedforward_layernorm",),
}
_NORMS = {
    "gemma2": _GEMMA2_NORMS,
    "gemma3_text": _GEMMA2_NORMS,
    "olmo2": _GEMMA2_NORMS,
    "glm4": {
        "self_attention.post_norm": ("post_self_attn_layernorm",),
        "mlp.post_norm": ("post_mlp_layernorm",),
    },
}
"""Families whose norms have names of their own."""
_INTERLEAVED = ("glm", "glm4")
"""Families that rotate neighbours (2i, 2i + 1) of a head's dimensions, not (i, i + rotated / 2)."""
_EXPERT = {"linear_fc1": ("gate_proj", "up_proj"), "linear_fc2": ("down_proj",)}
_MIXTRAL_EXPERT = {"linear_fc1": ("w1", "w3"), "linear_fc2": ("w2",)}
_SHARED_GATE = "mlp.shared_experts.gate_weight"
_TOP = {"embedding.word_embeddings": "model.embed_tokens", "decoder.final_layernorm": "model.norm"}


class Sliceable(Protocol):
    """A tensor in a file, or in memory, of which parts can be taken."""

    def __getitem__(self, index: tuple[slice, ...] | slice) -> Tensor: ...


def hf_names(spec: ModelSpec, name: str) -> tuple[str, ...]:
    """Names of the Hugging Face tensors that hold a parameter, in the order in which Megatron joins them."""
    module, kind = name.rsplit(".", 1)
    if module == "output_layer":
        return (SCORE,) if spec.head is Head.VALUE else (f"lm_head.{kind}",)
    if module in _TOP:
        return (f"{_TOP[module]}.{kind}",)
    _, _, index, inner = module.split(".", 3)
    at = f"model.layers.{index}"
    if name.endswith(_SHARED_GATE):
        return (f"{at}.mlp.shared_expert_gate.weight",)
    mixtral = is_mixtral(spec)
    if inner == "mlp.router" and mixtral:
        return (f"{at}.block_sparse_moe.gate.{kind}",)
    if "local_experts" in inner:
        *_, number, part = inner.split(".")
        if mixtral:
            return tuple(f"{at}.block_sparse_moe.experts.{number}.{p}.{kind}" for p in _MIXTRAL_EXPERT[part])
        return tuple(f"{at}.mlp.experts.{number}.{p}.{kind}" for p in _EXPERT[part])
    fused = _FUSED.get(spec.family, {}).get(inner)
    names = _LAYER | _NORMS.get(spec.family, {})
    return (f"{at}.{fused}.{kind}",) if fused else tuple(f"{at}.{part}.{kind}" for part in names[inner])


def is_mixtral(spec: ModelSpec) -> bool:
    """Whether a mixture of experts has Mixtral's names: the Qwen families have biases or norms of queries and keys."""
    return bool(spec.experts) and not (spec.qkv_bias or spec.qk_norm)


def has_vocabulary(spec: ModelSpec, parameter: Parameter) -> bool:
    """Whether the rows of a parameter are the padded vocabulary."""
    return parameter.name.startswith(("embedding.word", "output")) and parameter.shape[0] == spec.padded_vocab


def hf_shape(spec: ModelSpec, parameter: Parameter, index: int) -> tuple[int, ...]:
    """Shape of the `index`-th Hugging Face tensor of a parameter."""
    shapes = _part_shapes(spec, parameter)
    if len(hf_names(spec, parameter.name)) == len(shapes):
        return shapes[index]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _part_shapes(spec: ModelSpec, parameter: Parameter) -> list[tuple[int, ...]]:
    rows, *rest = parameter.shape
    if _QKV in parameter.name:
        heads = (spec.heads, spec.kv_heads, spec.kv_heads)
        return [(count * spec.head_dim, *rest) for count in heads]
    if parameter.blocks > 1:
        return [(rows // parameter.blocks, *rest)] * parameter.blocks
    return [(spec.vocab if has_vocabulary(spec, parameter) else rows, *rest)]


@dataclass(frozen=True)
class _Below:
    """The rows of a tensor from `first` on, of which none is read before it is asked for."""

    whole: Sliceable
    first: int

    def __getitem__(self, index: tuple[slice, ...] | slice) -> Tensor:
        rows, *rest = index if isinstance(index, tuple) else (index,)
        return self.whole[(slice(rows.start + self.first, rows.stop + self.first), *rest)]


def join(spec: ModelSpec, parameter: Parameter, tensors: Sequence[Sliceable], tp: int, rank: int) -> Tensor:
    """This tp rank's part of a parameter, read from the Hugging Face tensors without reading more than it holds."""
    shapes = _part_shapes(spec, parameter)
    parts = list(tensors)
    if len(parts) < len(shapes):
        above = accumulate((shape[0] for shape in shapes[:-1]), initial=0)
        parts = [_Below(parts[0], first) for first in above]
    if _QKV in parameter.name:
        groups = range(rank * spec.kv_heads // tp, (rank + 1) * spec.kv_heads // tp)
        return torch.cat([_rows(parts[i], spec, group, i) for group in groups for i in range(3)])
    slices = [_run(shape, parameter, tp, rank) for shape in shapes]
    tensor = torch.cat([part[cut] for part, cut in zip(parts, slices, strict=True)])
    missing = parameter.shape[0] // tp - tensor.shape[0] if parameter.axis == 0 else 0
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


def _rows(part: Sliceable, spec: ModelSpec, group: int, index: int) -> Tensor:
    """Rows of a group of query (index 0), key (1) or value (2), rotated halves apart."""
    rows = spec.head_dim * (spec.heads // spec.kv_heads if index == 0 else 1)
    found = part[group * rows : (group + 1) * rows]
    if index == 2 or spec.family not in _INTERLEAVED:
        return found
    return found.view(-1, spec.head_dim, *found.shape[1:])[:, _apart(spec)].flatten(0, 1)


def _apart(spec: ModelSpec) -> Tensor:
    """Which of a head's interleaved dimensions stands at each place here: even ones, odd ones, those not rotated."""
    turned = torch.arange(spec.rotated)
    return torch.cat([turned[0::2], turned[1::2], torch.arange(spec.rotated, spec.head_dim)])


def _run(shape: tuple[int, ...], parameter: Parameter, tp: int, rank: int) -> tuple[slice, ...]:
    """What a tp rank reads of a tensor; a vocabulary is cut where its padded rows are."""
    cuts = [slice(0, extent) for extent in shape]
    if parameter.axis is not None:
        axis, extent = parameter.axis, shape[parameter.axis]
        step = parameter.shape[axis] // parameter.blocks // tp
        cuts[axis] = slice(min(rank * step, extent), min((rank + 1) * step, extent))
    return tuple(cuts)


def split(spec: ModelSpec, parameter: Parameter, whole: Tensor) -> dict[str, Tensor]:
    """The Hugging Face tensors of a whole parameter; padding of the vocabulary is dropped."""
    names, shapes = hf_names(spec, parameter.name), _part_shapes(spec, parameter)
    if _QKV in parameter.name:
        groups = whole.view(spec.kv_heads, -1, *whole.shape[1:])
        per = spec.head_dim * (spec.heads // spec.kv_heads)
        parts = [part.flatten(0, 1) for part in torch.split(groups, [per, spec.head_dim, spec.head_dim], dim=1)]
        if spec.family in _INTERLEAVED:
            back = _apart(spec).argsort()
            heads = (part.view(-1, spec.head_dim, *part.shape[1:]) for part in parts[:2])
            parts = [*(head[:, back].flatten(0, 1) for head in heads), parts[2]]
    else:
        blocks = zip(whole.chunk(len(shapes)), shapes, strict=True)
        parts = [part[: shape[0]] for part, shape in blocks]
    if len(names) < len(parts):
        parts = [torch.cat(parts)]
    return dict(zip(names, parts, strict=True))
