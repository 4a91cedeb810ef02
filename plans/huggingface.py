"""ModelSpec from a Hugging Face `config.json`, and back. Reads JSON only; weights are the runtime's business.

Which keys are obeyed is said in `plans/families.py`; a config is applied whole or refused by the name of the key.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import ValidationError

from plans.config_keys import INERT
from plans.decoder import Decoder
from plans.documents import BadText, locate, parse_json, read_text, refuse
from plans.errors import SpecError, nearest
from plans.families import FAMILIES
from plans.model import ModelSpec
from plans.problems import Problem, shortened
from plans.shapes import shape_problems

CONFIG = "config.json"
TEXT = "text_config"
MOST_COEFFICIENT = 1e30


def spec_from_folder(folder: Path) -> ModelSpec:
    """The architecture of a Hugging Face model folder (or of a `config.json` itself).

    Raises SpecError with every located problem: a family or a key that is not obeyed, a value out of its range.
    """
    path = folder if os.path.isfile(folder) else folder / CONFIG
    hint = "name a folder that holds a Hugging Face model"
    if not os.path.exists(path):
        raise SpecError(f"no {CONFIG} in `{folder}`", hint)
    text = read_text(path, SpecError, "config", hint)
    try:
        config = parse_json(text)
    except BadText as error:
        refuse(SpecError, path, [error.problem])
    found = _read(config, path.resolve().parent.name)
    return refuse(SpecError, path, locate(text, found)) if isinstance(found, list) else found


def spec_from_config(config: dict[str, Any], name: str) -> ModelSpec:
    """ModelSpec of a parsed `config.json`; raises as `spec_from_folder`."""
    found = _read(config, name)
    return refuse(SpecError, CONFIG, found) if isinstance(found, list) else found


def router_aux_loss_coef(folder: Path) -> float:
    """How much the balance of experts counts in training by the config of a folder: nothing unless it says
    `output_router_logits`, as `transformers` reads it. Raises SpecError for what is no number from 0."""
    config = parse_json(read_text(folder / CONFIG, SpecError, "config"))
    config = config.get(TEXT, config)
    found = config.get("router_aux_loss_coef", 0.001)
    if config.get("output_router_logits") is not True:
        return 0.0
    if not isinstance(found, int | float) or not 0 <= found <= MOST_COEFFICIENT:
        message = f"`{folder / CONFIG}`: router_aux_loss_coef is {shortened(found)}; it must be a number from 0"
        raise SpecError(message, "actor.router_aux_loss_coef=0.001 in the run file, which counts before the config")
    return float(found)


def check_runs(folder: Path) -> None:
    """Raise SpecError for a folder whose family can be planned but not run."""
    kind = parse_json(read_text(folder / CONFIG, SpecError, "config"))["model_type"]
    if kind not in FAMILIES:
        message = f"`{folder}`: the text model of a `{kind}` can be planned; its weights lie among those of other parts"
        raise SpecError(message, "a folder of the text model alone")
    if not FAMILIES[kind].RUNS:
        run = ", ".join(f"`{name}`" for name, family in FAMILIES.items() if family.RUNS)
        raise SpecError(
            f"`{folder}`: model_type `{kind}` can be planned, this runtime does not run it", f"one of {run}"
        )


def _read(config: Any, name: str) -> ModelSpec | list[Problem]:
    if not isinstance(config, dict):
        return [Problem("value", "a config holds one object", '{"model_type": ..., ...}')]
    inner = _text_model(config)
    if inner is not None:
        found = _read(inner, name)
        return [problem.at((TEXT,)) for problem in found] if isinstance(found, list) else found
    family = _family(config)
    if isinstance(family, Problem):
        return [family]
    strange = [key for key, value in config.items() if value not in (None, {}, []) and not _known(key, family)]
    if strange:
        return [_strange(key, family, config) for key in strange]
    try:
        return family.model_validate({k: v for k, v in config.items() if k in family.model_fields}).spec(name)
    except ValidationError as error:
        problems = shape_problems(family, config, error, "the config")
        refused = {problem.path[:-1] for problem in problems if problem.rule == "not-obeyed"}
        # Keys beside a refused kind of scaling belong to that kind.
        return [p for p in problems if p.rule == "not-obeyed" or not p.path[:-1] or p.path[:-1] not in refused]
    except SpecError as error:
        return [Problem("model", error.message, error.hint)]


def _text_model(config: dict[str, Any]) -> dict[str, Any] | None:
    """The config of the text model inside one of a model of several parts (text and images, say), where it is known."""
    inner = config.get(TEXT)
    if _is_family(config.get("model_type")) or not isinstance(inner, dict) or not _is_family(inner.get("model_type")):
        return None
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
    return tied | inner


def _is_family(kind: Any) -> TypeGuard[str]:
    return isinstance(kind, str) and kind in FAMILIES


def _family(config: dict[str, Any]) -> type[Decoder] | Problem:
    kind = config.get("model_type")
    run = ", ".join(f"`{name}`" for name, family in FAMILIES.items() if family.RUNS)
    plan = ", ".join(f"`{name}`" for name, family in FAMILIES.items() if not family.RUNS)
    hint = f"these run: {run}; these can be planned: {plan}"
    if _is_family(kind):
        return FAMILIES[kind]
    if kind is None:
        return Problem("missing-key", "key `model_type` is missing", hint)
    inner = config.get(TEXT)
    if isinstance(inner, dict):
        part = inner.get("model_type")
        message = f"model_type `{shortened(kind)}` joins a text model (`{shortened(part)}`) with other parts"
        return Problem("family", f"{message}; its text model is not known", hint, (TEXT,))
    return Problem("family", f"model_type `{shortened(kind)}` is not known", hint, ("model_type",))


def _known(key: str, family: type[Decoder]) -> bool:
    return key in family.model_fields or key in INERT or key.startswith("_")


def _strange(key: str, family: type[Decoder], config: dict[str, Any]) -> Problem:
    """The problem of a key that the family does not have; other families that do have it are named."""
    kind = config["model_type"]
    others = [f"`{name}`" for name, other in FAMILIES.items() if key in other.model_fields]
    if others:
        hint = f"a key of {', '.join(others)}: is `model_type` right? Delete it if the model does not use it"
    else:
        close = nearest(key, [name for name in family.model_fields if name not in config])
        hint = close if close.startswith("did") else "delete it if it changes nothing"
    message = f"key `{shortened(key)}` is not one of a {kind} model, and may change the numbers"
    return Problem("unknown-key", message, hint, (key,))


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """A `config.json` for a model that was not read from one."""
    family = _family_of(spec)
    rope = _rope_keys(spec)
    return {
        "architectures": [FAMILIES[family].ARCHITECTURE],
        "model_type": family,
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.ffn,
        "vocab_size": spec.vocab,
        "hidden_act": "gelu_pytorch_tanh" if spec.activation == "gelu_tanh" else spec.activation,
        "tie_word_embeddings": spec.tied_embeddings,
        "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.max_context,
        "rope_theta": spec.rope_theta,
        "rope_parameters": rope,
        **({"sliding_window": spec.window or None} if family in ("mistral", "phi3") else {}),
        **({"original_max_position_embeddings": first} if (first := _first_context(spec, family)) else {}),
        **_expert_keys(spec, family),
        **_gemma_keys(spec, family),
        # The default of the padding token lies beyond a small vocabulary.
        **({"attention_bias": spec.qkv_bias, "pad_token_id": None} if family in ("glm", "glm4") else {}),
    }


def _gemma_keys(spec: ModelSpec, family: str) -> dict[str, Any]:
    """What the configs of Gemma 2 and 3 have beside the rest."""
    if not family.startswith("gemma"):
        return {}
    keys: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh"}
    if family == "gemma":
        return keys
    keys |= {
        "query_pre_attn_scalar": int(spec.query_scalar),
        "sliding_window": spec.window or None,
        "attn_logit_softcapping": spec.attention_cap or None,
        "final_logit_softcapping": spec.logit_cap or None,
    }
    if family == "gemma2":
        return keys
    local = {"rope_type": "default", "rope_theta": spec.local_rope_theta or spec.rope_theta}
    rope = {"full_attention": _rope_keys(spec), "sliding_attention": local}
    return keys | {"sliding_window_pattern": spec.full_every or 6, "rope_parameters": rope}


def _first_context(spec: ModelSpec, family: str) -> int:
    """The context of the first training where a config has it beside its rotary positions, else 0."""
    return getattr(spec.rope_scaling, "original_max_position", spec.max_context) if family == "phi3" else 0


def _rope_keys(spec: ModelSpec) -> dict[str, Any]:
    """`rope_parameters` of an architecture."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rope_theta}
    if spec.rotary_dim:
        rope["partial_rotary_factor"] = spec.rotary_dim / spec.head_dim
    if spec.rope_scaling is None:
        return rope
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(spec.rope_scaling).items()}
    original = values.pop("original_max_position", None)
    if original and spec.rope_scaling.kind != "dynamic":
        values["original_max_position_embeddings"] = original
    return rope | {"rope_type": spec.rope_scaling.kind} | values


def _family_of(spec: ModelSpec) -> str:
    """The family that has just what an architecture has."""
    if spec.family:
        return spec.family
    if spec.experts:
        return "qwen3_moe" if spec.qk_norm else "qwen2_moe" if spec.qkv_bias else "mixtral"
    return "qwen3" if spec.qk_norm else "qwen2" if spec.qkv_bias else "mistral" if spec.window else "llama"


def _expert_keys(spec: ModelSpec, family: str) -> dict[str, Any]:
    if not spec.experts:
        return {}
    keys: dict[str, Any] = {"num_experts_per_tok": spec.experts_per_token}
    if family == "mixtral":
        return keys | {"num_local_experts": spec.experts}
    keys |= {"num_experts": spec.experts, "moe_intermediate_size": spec.ffn, "norm_topk_prob": spec.normalize_gates}
    return keys | ({"shared_expert_intermediate_size": spec.shared_ffn} if family == "qwen2_moe" else {})
