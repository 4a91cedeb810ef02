"""Tiny models for the runtime's tests: Hugging Face's as the reference, written as folders, and the runtime's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from plans.layout import Layout, Parameter
from plans.model import ModelSpec
from runtime.groups import GroupCache
from runtime.models.model import Model, build_model
from runtime.sequences import Sequences

MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [9.0] * 6,
}


WINDOWED = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5, "hidden_activation": "gelu_pytorch_tanh"}
CAPPED = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}


def tiny_model(kind: str, **overrides: Any) -> PreTrainedModel:
    """`llama`, `llama-tied`, `five` (tied), `llama3`, `qwen2` (tied, biases), `qwen3` (query-key norms), `reward`,
    `phi3` (fused weights, longrope with an amplitude, three quarters of a head rotated), `gemma`, `gemma2` (soft caps)
    and `gemma3`, both with windows of 5 tokens, `olmo2`, `glm4`, or a
    mixture of 8 experts of which a token visits 2: `mixtral`, `qwen2-moe` (shared expert), `qwen3-moe`.

    `reward` has a score head. Four layers (`five` has five), hidden 64, 4 heads on 2 kv heads, vocabulary 250: not a
    multiple of 128, so that rows are padded.
    """
    base: dict[str, Any] = {
        "vocab_size": 250,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5 if kind == "five" else 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "tie_word_embeddings": kind in ("llama-tied", "five", "qwen2"),
    } | overrides
    torch.manual_seed(0)
    model: PreTrainedModel
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**base))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**base, head_dim=32))
    elif kind == "phi3":
        model = Phi3ForCausalLM(Phi3Config(**base, rope_parameters=LONG_ROPE, original_max_position_embeddings=64))
    elif kind == "gemma":
        model = GemmaForCausalLM(GemmaConfig(**base | {"tie_word_embeddings": True}, head_dim=16))
    elif kind == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**base | WINDOWED | CAPPED | {"tie_word_embeddings": True}))
    elif kind == "gemma3":
        windows = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
        gemma3 = base | WINDOWED | {"tie_word_embeddings": True, "layer_types": windows, "sliding_window_pattern": 3}
        model = Gemma3ForCausalLM(Gemma3TextConfig(**gemma3))
    elif kind == "olmo2":
        model = Olmo2ForCausalLM(Olmo2Config(**base))
    elif kind == "glm4":
        model = Glm4ForCausalLM(Glm4Config(**base, head_dim=16))
    elif kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**base, num_local_experts=8, num_experts_per_tok=2))
    elif kind == "qwen2-moe":
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**base, **MIXTURE, shared_expert_intermediate_size=80))
    elif kind.startswith("qwen3-moe"):
        scaled = kind == "qwen3-moe"  # "qwen3-moe-raw-gates": the gates of the chosen experts do not add up to 1
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**base, **MIXTURE, head_dim=32, norm_topk_prob=scaled))
    elif kind == "reward":
        model = LlamaForSequenceClassification(LlamaConfig(**base, num_labels=1))
    else:
        rope = {"rope_parameters": LLAMA3_ROPE} if kind == "llama3" else {}
        model = LlamaForCausalLM(LlamaConfig(**base, **rope))
    model.set_attn_implementation("eager")  # others leave soft caps out
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + 0.1 * noise)
    return model.eval()


def save_tiny(kind: str, folder: Path, **overrides: Any) -> PreTrainedModel:
    """Write `tiny_model` to a folder, in several files; the model."""
    model = tiny_model(kind, **overrides)
    model.save_pretrained(folder, max_shard_size="200KB")
    return model


def checkpoint_tensors(kind: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by a model's parameter names under the names of its checkpoint, which keeps experts and gates apart."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if not module.endswith("experts"):
            found[name] = tensor
            continue
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
        for expert, whole in enumerate(tensor):
            for part, values in zip(parts, whole.chunk(len(parts)), strict=True):
                found[f"{module}.{expert}.{part}.weight"] = values
    if kind != "mixtral":
        return found
    own = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for old, new in own.items():
        found = {name.replace(old, new): tensor for name, tensor in found.items()}
    return found


def mixed_sequences(samples: int, prompt: int, response: int, vocab: int = 250, seed: int = 1) -> Sequences:
    """Prompts of 2 to `prompt` and responses of 1 to `response` random tokens; where there are three, one response is
    empty."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, n: int) -> list[int]:
        found: list[int] = torch.randint(low, high, (n,), generator=generator).tolist()
        return found

    prompts, responses = draw(2, prompt + 1, samples), draw(1, response + 1, samples)
    if samples > 2:
        responses[2] = 0
    return Sequences.of([draw(1, vocab, n) for n in prompts], [draw(1, vocab, n) for n in responses])


def part_shape(parameter: Parameter, tp: int) -> tuple[int, ...]:
    """Shape of a rank's part of a parameter."""
    return tuple(n // tp if i == parameter.axis else n for i, n in enumerate(parameter.shape))


def layout_of(spec: ModelSpec, **degrees: Any) -> Layout:
    """A layout on the first ranks."""
    size = math.prod(degrees.get(axis, 1) for axis in ("dp", "tp", "pp", "cp"))
    return Layout(spec, tuple(range(size)), **degrees)


def build(groups: GroupCache, layout: Layout, **settings: Any) -> Model | None:
    """A model on the ranks of its layout, None elsewhere."""
    mine = groups.collection(layout)
    return None if mine is None else build_model(layout, mine, device=torch.device("cpu"), **settings)
