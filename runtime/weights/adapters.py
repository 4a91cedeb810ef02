"""Adapters out: merged into the weights that they stand beside, and as a folder that `peft` loads.

Megatron fuses query, key and value, and gate and up; `peft` has a pair of matrices for each Hugging Face tensor. The
parts of a fused B go to theirs, each beside a copy of the A that they share.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plans.layout import Parameter
from plans.lora import Lora
from plans.model import ModelSpec
from plans.run_output import adapter_of
from runtime.weights.hf_names import hf_names
from runtime.weights.hf_parts import split

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_STAGE = "stage-*.safetensors"


def adapter_folder(folder: Path) -> Path:
    """Where the adapter of a model stands that is exported to `folder`."""
    return folder.with_name(adapter_of(folder.name))


def merged(
    spec: ModelSpec, parameters: Iterable[tuple[Parameter, Tensor]], adapters: dict[str, Tensor]
) -> Iterator[tuple[Parameter, Tensor]]:
    """The weights of whole parameters in the order of `model_units`, what their adapters add included. The adapters
    themselves go to `adapters`, under the names of `peft`."""
    pair: list[Tensor] = []
    for parameter, whole in parameters:
        if parameter.adapter:
            pair.append(whole)
            if len(pair) == 2:
                adapters |= _named(spec, parameter, *pair)
            continue
        if pair:
            assert spec.lora is not None
            a, b = (part.float() for part in pair)
            whole = whole.float().add_(b @ a, alpha=spec.lora.scale).to(whole.dtype)
            pair = []
        yield parameter, whole


def _named(spec: ModelSpec, parameter: Parameter, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """An adapter's matrices by `peft`'s names: for each tensor of the weight an A and its part of B, the parameter."""
    found = {}
    for name, part in split(spec, parameter, b).items():
        at = f"base_model.model.{name.rpartition('.')[0]}"
        found[f"{at}.lora_A.weight"] = a.clone()
        found[f"{at}.lora_B.weight"] = part.clone(memory_format=torch.contiguous_format)
    return found


def write_stage(folder: Path, stage: int, adapters: dict[str, Tensor]) -> None:
    """Write the adapters of a pipeline stage."""
    save_file(adapters, folder / _STAGE.replace("*", f"{stage:05d}"), metadata={"format": "pt"})


def join_stages(spec: ModelSpec, folder: Path, base: str) -> None:
    """Make one file of those of all stages, as `peft` wants it, and a configuration that names the base."""
    assert spec.lora is not None
    files = sorted(folder.glob(_STAGE))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for file in files:
        file.unlink()
    config = _config(spec, spec.lora, base)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _config(spec: ModelSpec, lora: Lora, base: str) -> dict[str, Any]:
    """`peft`'s LoraConfig; `base` is the folder of the base."""
    blocks = {"linear_qkv": "self_attention", "linear_proj": "self_attention", "linear_fc1": "mlp", "linear_fc2": "mlp"}
    names = (f"decoder.layers.0.{blocks[target]}.{target}.weight" for target in lora.targets)
    modules = [name.split(".")[-2] for fused in names for name in hf_names(spec, fused)]
    alpha = lora.scale * lora.rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
