"""Megatron's parameters in Hugging Face's terms: which tensors of a checkpoint make up a parameter, and back.

Llama, Mistral, Qwen2 and Qwen3 name their tensors alike; Mixtral has names of its own for experts. Megatron fuses
query, key and value group by group ([q..., k, v] for each kv head), and gate above up; Hugging Face keeps them apart,
or (`_FUSED`) stacks all queries, all keys and all values. A *part* is one of them, wherever it lies. Without torch, so
that a folder is checked before it is loaded.
"""

from __future__ import annotations

from plans.layout import Parameter
from plans.model import Head, ModelSpec

SCORE = "score.weight"
QKV = "self_attention.linear_qkv"
_LAYER = {
    QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
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
_FUSED = {"phi3": {QKV: "self_attn.qkv_proj", **_GATE_UP}, "glm": _GATE_UP, "glm4": _GATE_UP}
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
_EXPERT = {"linear_fc1": ("gate_proj", "up_proj"), "linear_fc2": ("down_proj",)}
_MIXTRAL_EXPERT = {"linear_fc1": ("w1", "w3"), "linear_fc2": ("w2",)}
_SHARED_GATE = "mlp.shared_experts.gate_weight"
_TOP = {"embedding.word_embeddings": "model.embed_tokens", "decoder.final_layernorm": "model.norm"}


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
    shapes = part_shapes(spec, parameter)
    if len(hf_names(spec, parameter.name)) == len(shapes):
        return shapes[index]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def part_shapes(spec: ModelSpec, parameter: Parameter) -> list[tuple[int, ...]]:
    """Shapes of the parts of a parameter, in the order in which Megatron joins them."""
    rows, *rest = parameter.shape
    if QKV in parameter.name:
        heads = (spec.heads, spec.kv_heads, spec.kv_heads)
        return [(count * spec.head_dim, *rest) for count in heads]
    if parameter.blocks > 1:
        return [(rows // parameter.blocks, *rest)] * parameter.blocks
    return [(spec.vocab if has_vocabulary(spec, parameter) else rows, *rest)]
