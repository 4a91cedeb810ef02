"""Adapters against one process of Hugging Face and torch, in every layout: gradients, steps, tokens, folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_models import build, layout_of, save_tiny, tiny_model
from torch import Tensor, nn
from training_cases import (
    CONTEXT_CASES,
    SETTINGS,
    Against,
    Steps,
    check_layouts,
    full_batch,
    reference_output,
    weighted_loss,
)
from transformers import AutoModelForCausalLM

from plans.huggingface import spec_from_folder
from plans.layout import Parameter, model_units
from plans.lora import Lora
from plans.model import ModelSpec
from plans.strategy import Recompute
from runtime.generation.generate import generate
from runtime.generation.sampling import Sampling
from runtime.groups import GroupCache
from runtime.models import installation
from runtime.models.model import Model, named_shards
from runtime.models.shards import shard
from runtime.weights.export import export
from runtime.weights.hf import load_weights
from runtime.weights.hf_names import hf_names, hf_shape
from runtime.weights.hf_parts import join

CPU = torch.device("cpu")
LORA = Lora(4, 6.0)
CASES: tuple[dict[str, Any], ...] = (
    {},
    {"dp": 2, "tp": 2, "sequence_parallel": True},
    {"pp": 2, "recompute": Recompute.FULL},
    {"dp": 2, "pp": 2, "vpp": 2},
    {"dp": 2, "tp": 2, "shard_optimizer": False, "recompute": Recompute.SELECTIVE},
    {"tp": 2, "pp": 2, "sequence_parallel": True, "recompute": Recompute.FULL, "shard_optimizer": False},
    CONTEXT_CASES[0],
)
KINDS = {
    "llama": (LORA, CASES),
    "qwen2": (LORA, CASES[5:6]),  # biases, tied embeddings
    "phi3": (replace(LORA, targets=("linear_fc1", "linear_qkv")), CASES[5:6]),  # fused tensors
    "glm4": (LORA, CASES[4:5]),  # rows in another order, norms behind
    "gemma2": (replace(LORA, targets=("linear_proj",)), CASES[1:2]),
}


class Adapted(nn.Module):
    """A linear layer of Hugging Face's with an adapter."""

    def __init__(self, linear: nn.Linear, a: nn.Parameter, b: nn.Parameter, scale: float) -> None:
        super().__init__()
        self.linear, self.a, self.b, self.scale = linear, a, b, scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + self.scale * (x @ self.a.t()) @ self.b.t()
        return out


def adapt(model: Any, spec: ModelSpec) -> dict[str, nn.Parameter]:
    """Give a model of Hugging Face's adapters of random numbers, B too; by our name of A, and by theirs of each part of
    B. What is fused here shares its A."""
    assert spec.lora is not None
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    found: dict[str, nn.Parameter] = {}

    def draw(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=generator) * 0.1)

    for parameter in (p for unit in model_units(spec) for p in unit.parameters if p.adapter):
        if parameter.name.endswith("lora_a"):
            a = found[parameter.name] = draw(*parameter.shape)
            continue
        for i, name in enumerate(hf_names(spec, parameter.name)):
            b = found[name] = draw(*hf_shape(spec, parameter, i))
            at, _, leaf = name.removesuffix(".lora_b").rpartition(".")
            owner = model.get_submodule(at)
            setattr(owner, leaf, Adapted(getattr(owner, leaf), a, b, 6.0 / 4))
    return found


def part(model: Model, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Tensor:
    """This rank's part of an adapter's matrix."""
    tp, rank = model.layout.tp, model.place.tp
    if parameter.name.endswith("lora_a"):
        return shard(parameter, tensors[parameter.name], tp, rank)
    return join(model.spec, parameter, [tensors[name] for name in hf_names(model.spec, parameter.name)], tp, rank)


@torch.no_grad()
def fill(model: Model, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Weights of a folder, and the reference's adapters."""
    load_weights(model, folder)
    for parameter, held in named_shards(model):
        if parameter.adapter:
            assert parameter.name.endswith("lora_a") or not held.any()  # training begins at the frozen model
            held.copy_(part(model, parameter, tensors))


def values(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_one_process(kind: str, tmp_path: Path):
    lora, cases = KINDS[kind]
    save_tiny(kind, tmp_path)
    spec = replace(spec_from_folder(tmp_path), lora=lora)
    model, batch = tiny_model(kind), full_batch()
    adapters = adapt(model, spec)
    found = Steps(initial=values(adapters))
    adam = torch.optim.AdamW(adapters.values(), betas=(SETTINGS.beta1, SETTINGS.beta2), eps=SETTINGS.eps,
                             weight_decay=SETTINGS.weight_decay)  # fmt: skip
    for step in range(2):
        adam.zero_grad()
        loss, _ = weighted_loss(reference_output(model, batch, False), batch)
        loss.backward()
        found.grads = found.grads or {name: p.grad.clone() for name, p in adapters.items()}
        found.norms.append(float(nn.utils.clip_grad_norm_(adapters.values(), SETTINGS.clip_norm)))
        found.losses.append(float(loss.detach()))
        adam.param_groups[0]["lr"] = SETTINGS.lr_at(step)
        adam.step()
    found.final = values(adapters)
    check_layouts(spec, cases, Against(found, lambda model: fill(model, tmp_path, found.initial), part))


PROMPTS = [[5, 9, 200, 17], [33, 4], [7, 70, 8, 80, 9]]


@dataclass(frozen=True)
class Exported:
    """What a layout generated and exported, in `folder`, and the model of Hugging Face's that it must equal."""

    folder: Path
    reference: Any
    responses: list[list[int]]


@pytest.fixture(scope="module", params=[("llama", {"tp": 2, "pp": 2}), ("glm4", {"tp": 2}), ("phi3", {"pp": 2})])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Of random adapters, B too."""
    kind, degrees = request.param
    folder: Path = tmp_path_factory.mktemp(kind)
    save_tiny(kind, folder / "base")
    spec, reference = replace(spec_from_folder(folder / "base"), lora=LORA), tiny_model(kind)
    adapters = values(adapt(reference, spec))

    def run() -> list[list[int]]:
        installation.install(CPU)
        model = build(GroupCache(CPU), layout_of(spec, **degrees))
        assert model is not None
        fill(model, folder / "base", adapters)
        settings: dict[str, Any] = {"response_tokens": [6] * 3, "sampling": Sampling(temperature=0), "seed": 0}
        made = generate(model, PROMPTS, range(3), iteration=0, stop_ids=(), **settings)
        export(model.layout, model, folder / "out", folder / "base", dtype=torch.float32)
        return [response for _, response in made.sequences.texts()]

    return Exported(folder, reference, run_ranks(prod(degrees.values()), run)[0])


@torch.no_grad()
def test_unmerged_generation_says_what_the_merged_export_says(exported: Exported) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(exported.folder / "out", dtype=torch.float32)
    for prompt, response in zip(PROMPTS, exported.responses, strict=True):
        ids = torch.tensor([prompt + response])
        logits = loaded(ids).logits[0]
        torch.testing.assert_close(logits, exported.reference(ids).logits[0], atol=1e-4, rtol=1e-4)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == response


@torch.no_grad()
def test_peft_loads_the_adapter(exported: Exported) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(exported.folder / "base", dtype=torch.float32)
    adapted, ids = peft.PeftModel.from_pretrained(base, exported.folder / "out-adapter"), torch.tensor(PROMPTS[2:])
    torch.testing.assert_close(adapted(ids).logits, exported.reference(ids).logits, atol=1e-4, rtol=1e-4)
