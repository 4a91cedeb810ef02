"""Families with traits of their own against `transformers`: folders in and out, generation, value heads.

Their logits, losses and gradients are in `test_training.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_models import build, layout_of, mixed_sequences, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from plans.huggingface import config_from_spec, spec_from_config, spec_from_folder
from plans.layout import model_units
from runtime.generation.generate import FlightLimits, generate
from runtime.generation.sampling import Sampling
from runtime.groups import GroupCache
from runtime.models import installation
from runtime.models.model import named_shards
from runtime.passes.forward import token_values
from runtime.sequences import Sequences
from runtime.weights.export import export
from runtime.weights.hf import load_weights

CPU = torch.device("cpu")
FAMILIES = ("gemma", "gemma2", "gemma3", "olmo2", "glm4")
LAYOUTS: tuple[dict[str, int], ...] = ({"tp": 2}, {"pp": 2})
PROMPTS = [[5, 9, 200, 31, 7, 8, 77], [1, 2], [90, 80, 70, 60]]
STEPS = 10


def continued(reference: Any) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy responses and their log-probabilities, from whole forward passes."""
    responses, logprobs = [], []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = list(prompt)
            for _ in range(STEPS):
                ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
            logs = reference(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            responses.append(ids[len(prompt) :])
            logprobs.append(logs[len(prompt) - 1 : -1].gather(1, torch.tensor(responses[-1])[:, None])[:, 0])
    return responses, logprobs


@pytest.mark.parametrize("kind", FAMILIES)
def test_generation_export_and_values_equal_transformers(kind: str, tmp_path: Path) -> None:
    reference = save_tiny(kind, tmp_path / "source")
    spec = spec_from_folder(tmp_path / "source")
    held = sum(p.size for unit in model_units(spec) for p in unit.parameters)
    padding = (spec.padded_vocab - spec.vocab) * spec.hidden * (1 if spec.tied_embeddings else 2)
    assert spec.params == held - padding == sum(p.numel() for p in reference.parameters())
    batch = mixed_sequences(3, prompt=9, response=6)
    head = torch.linspace(-1, 1, spec.hidden)

    def rank() -> list[tuple[Sequences, torch.Tensor, torch.Tensor]]:
        installation.install(CPU)
        groups, found = GroupCache(CPU), []
        for number, degrees in enumerate(LAYOUTS):
            model = build(groups, layout_of(spec, **degrees))
            valued = build(groups, layout_of(spec.with_value_head(), **degrees))
            assert model is not None and valued is not None
            load_weights(model, tmp_path / "source")
            load_weights(valued, tmp_path / "source")
            for parameter, tensor in named_shards(valued):
                if parameter.name == "output_layer.weight":
                    tensor.data.copy_(head[None])
            made = generate(
                model, PROMPTS, [0, 1, 2], response_tokens=STEPS, sampling=Sampling(temperature=0), seed=0, iteration=0,
                limits=FlightLimits(slots=2),
            )  # fmt: skip
            export(model.layout, model, tmp_path / f"out{number}", tmp_path / "source", dtype=torch.float32)
            found.append((made.sequences, made.logprobs, token_values(valued, batch)))
        return found

    responses, logprobs = continued(reference)
    values = []
    with torch.no_grad():
        for prompt, response in batch.texts():
            states = reference.model(torch.tensor([prompt + response])).last_hidden_state[0]
            values.append((states @ head)[len(prompt) - 1 : -1])
    for sequences, ours, scored in run_ranks(2, rank)[0]:
        assert [response for _, response in sequences.texts()] == responses
        torch.testing.assert_close(ours, torch.cat(logprobs), rtol=0, atol=2e-5)
        torch.testing.assert_close(scored, torch.cat(values), rtol=1e-5, atol=2e-5)
    original = load_all(tmp_path / "source")
    for number in range(len(LAYOUTS)):
        written = load_all(tmp_path / f"out{number}")
        assert written.keys() == original.keys()
        assert all(torch.equal(written[name], original[name]) for name in original)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", FAMILIES)
def test_written_configs_mean_the_same_to_both(kind: str, tmp_path: Path) -> None:
    """What is written for random weights is read back alike, and makes the same model in `transformers`."""
    reference = save_tiny(kind, tmp_path)
    spec = spec_from_folder(tmp_path)
    written = config_from_spec(spec)
    assert spec_from_config(written, spec.name) == spec
    config = AutoConfig.for_model(**written)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.load_state_dict(reference.state_dict())
    ids = torch.arange(1, 24)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, reference(ids).logits)
