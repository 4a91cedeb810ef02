"""ModelSpec from a Hugging Face `config.json`, and back. Reads JSON only; weights are the runtime's business."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plans.errors import SpecError, nearest
from plans.model import ModelSpec, RopeScaling

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ACTIVATIONS = {"silu": "silu", "swish": "silu"}


def spec_from_folder(folder: Path) -> ModelSpec:
    """The architecture of a Hugging Face model folder (or of a `config.json` itself)."""
    path = folder if folder.is_file() else folder / "config.json"
    if not path.is_file():
        raise SpecError(f"no config.json in `{folder}`", "name a folder that holds a Hugging Face model")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise SpecError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    if not isinstance(config, dict):
        raise SpecError(f"{path}: a config.json holds one object")
    return spec_from_config(config, path.parent.name)


def spec_from_config(config: dict[str, Any], name: str) -> ModelSpec:
    """ModelSpec of a parsed `config.json`. Errors name the missing or unsupported key."""
    family = config.get("model_type", "llama")
    if family not in _FAMILIES:
        raise SpecError(f"config.json: model_type `{family}` is not supported", nearest(str(family), _FAMILIES))
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key) and family != "qwen2":
            raise SpecError(f"config.json: {key} of a {family} model is not supported", "a model without these biases")
    activation = config.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise SpecError(f"config.json: hidden_act `{activation}` is not supported", "`silu`")
    try:
        heads = config["num_attention_heads"]
        return ModelSpec(
            name=name,
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            ffn=config["intermediate_size"],
            vocab=config["vocab_size"],
            activation=_ACTIVATIONS[activation],
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            max_context=min(config.get("max_position_embeddings", 4096), _window(config)),
            rope_theta=_rope(config).get("rope_theta", config.get("rope_theta", 10000.0)),
            rope_scaling=_scaling(_rope(config)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
        )
    except KeyError as missing:
        raise SpecError(f"config.json: key {missing} is missing") from None


def _window(config: dict[str, Any]) -> int:
    """Tokens up to which attention over a sliding window equals full attention."""
    return (
        config["sliding_window"] if config.get("use_sliding_window", True) and config.get("sliding_window") else 2**31
    )


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings: `rope_parameters` of newer configs, `rope_scaling` of older ones."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise SpecError(f"config.json: rope_type `{kind}` is not supported", "`default` or `llama3`")
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position=rope["original_max_position_embeddings"],
    )


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """A `config.json` for a model that was not read from one."""
    family = "qwen3" if spec.qk_norm else "qwen2" if spec.qkv_bias else "llama"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rope_theta}
    if spec.rope_scaling:
        scaling = spec.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.ffn,
        "vocab_size": spec.vocab,
        "hidden_act": spec.activation,
        "tie_word_embeddings": spec.tied_embeddings,
        "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.max_context,
        "rope_theta": spec.rope_theta,
        "rope_parameters": rope,
    }
