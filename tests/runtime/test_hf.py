"""Hugging Face folders in and out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_models import build, layout_of, padded_batch, save_tiny
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from plans.huggingface import spec_from_config, spec_from_folder
from plans.model import ModelSpec
from runtime.groups import GroupCache
from runtime.models import installation
from runtime.models.model import named_shards
from runtime.passes.forward import token_values
from runtime.weights.export import export, weight_files
from runtime.weights.hf import Checkpoint, WeightsError, load_weights, random_weights

CPU = torch.device("cpu")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_round_trip_is_bit_identical(kind: str, tmp_path: Path):
    source = tmp_path / "source"
    reference = save_tiny(kind, source)
    (source / "tokenizer.json").write_text("{}")
    spec = spec_from_folder(source)
    layouts = ({"tp": 2, "pp": 2}, {"dp": 2, "tp": 2}, {"pp": 2, "vpp": 2}, {})

    def write() -> None:
        installation.install(CPU)
        groups = GroupCache(CPU)
        for i, degrees in enumerate(layouts):
            model = build(groups, layout_of(spec, **degrees))
            if model is not None:
                load_weights(model, source)
                export(model, tmp_path / f"out{i}", source, shard_bytes=10**9 if not degrees else 10**5)

    run_ranks(4, write)
    original = tensors(source)
    for i in range(len(layouts)):
        folder = tmp_path / f"out{i}"
        written = tensors(folder)
        assert written.keys() == original.keys()
        assert all(torch.equal(written[name], original[name]) for name in original)
        assert (folder / "tokenizer.json").is_file()
    assert (tmp_path / "out3" / "model.safetensors").is_file()
    assert not list(tmp_path.glob(".*"))
    tokens = torch.arange(1, 20)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out0")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, reference(tokens).logits)


def test_a_second_export_replaces_the_first(tmp_path: Path):
    spec = ModelSpec(name="tiny", layers=2, hidden=32, heads=2, kv_heads=2, head_dim=16, ffn=48, vocab=130)

    def write() -> None:
        installation.install(CPU)
        model = build(GroupCache(CPU), layout_of(spec))
        assert model is not None
        for seed in (1, 2):
            random_weights(model, seed)
            export(model, tmp_path / "out", shard_bytes=10**9 if seed == 2 else 10**4)

    run_ranks(1, write)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert spec_from_folder(tmp_path / "out").vocab == 130
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight.shape == (130, 32)


def test_value_head_from_a_language_model_starts_from_zero_and_returns(tmp_path: Path):
    save_tiny("llama", tmp_path / "lm")
    spec = spec_from_folder(tmp_path / "lm").with_value_head()
    batch = padded_batch(2, prompt=6, response=6)

    def write() -> tuple[torch.Tensor, torch.Tensor]:
        installation.install(CPU)
        model = build(GroupCache(CPU), layout_of(spec, pp=2))
        assert model is not None
        load_weights(model, tmp_path / "lm")
        zero = token_values(model, batch["tokens"], batch["mask"])
        with torch.no_grad():
            for parameter, tensor in named_shards(model):
                if parameter.name == "output_layer.weight":
                    tensor.copy_(torch.linspace(-1, 1, spec.hidden)[None])
        export(model, tmp_path / "critic", tmp_path / "lm")
        load_weights(model, tmp_path / "critic")
        return zero, token_values(model, batch["tokens"], batch["mask"])

    zero, values = run_ranks(2, write)[0]
    assert not zero.any()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    real = batch["tokens"][0][batch["mask"][0]]
    with torch.no_grad():
        expected = loaded(real[None]).logits[0, 0]
    torch.testing.assert_close(values[0, batch["mask"][0]][-1], expected, rtol=1e-5, atol=1e-5)


def test_each_rank_reads_only_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_tiny("llama", tmp_path)
    spec = spec_from_folder(tmp_path)
    whole = sum(tensor.numel() for tensor in tensors(tmp_path).values())

    class Counting:
        def __init__(self, part: object) -> None:
            self.part = part

        def __getitem__(self, index: object) -> torch.Tensor:
            found = self.part[index]
            count[0] += found.numel()
            return found

    count = [0]
    real = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name, shape: Counting(real(self, name, shape)))

    def read() -> int:
        installation.install(CPU)
        model = build(GroupCache(CPU), layout_of(spec, tp=2, pp=2))
        assert model is not None
        load_weights(model, tmp_path)
        return count[0]

    assert sum(run_ranks(4, read)) < 1.01 * whole


def test_weight_files_hold_every_parameter_once():
    spec = ModelSpec(
        name="t", layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=250, tied_embeddings=True
    )
    for degrees in ({}, {"pp": 2}, {"pp": 2, "vpp": 2}):
        files = weight_files(layout_of(spec, **degrees), 4, shard_bytes=100_000)
        names = [parameter.name for run in files.values() for parameter in run]
        assert len(names) == len(set(names)) == 2 + 4 * 6
        assert all(len(run) == 1 or sum(p.size for p in run) * 4 <= 100_000 for run in files.values())


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(WeightsError, match="no weights at"):
        Checkpoint(tmp_path)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path):
    save_file({"model.norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(WeightsError, match=r"no tensor `model.norms.weight`[^?]*`model.norm.weight`"):
        checkpoint.tensor("model.norms.weight", (8,))
    with pytest.raises(WeightsError, match=r"shape \[8\]; the model needs \[16\]"):
        checkpoint.tensor("model.norm.weight", (16,))


def test_configs_that_transformers_writes_are_read():
    for config in (LlamaConfig(), MistralConfig(), Qwen2Config(), Qwen3Config()):
        spec = spec_from_config(config.to_dict(), "x")
        assert (spec.heads, spec.kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
        assert (spec.norm_eps, spec.max_context) == (config.rms_norm_eps, config.max_position_embeddings)
        assert spec.window == (4096 if config.model_type == "mistral" else 0)


def test_index_is_like_hugging_faces(tmp_path: Path):
    save_tiny("llama", tmp_path / "source")
    spec = spec_from_folder(tmp_path / "source")

    def write() -> None:
        installation.install(CPU)
        model = build(GroupCache(CPU), layout_of(spec, pp=2))
        assert model is not None
        load_weights(model, tmp_path / "source")
        export(model, tmp_path / "out")

    run_ranks(2, write)
    ours = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    theirs = json.loads((tmp_path / "source" / "model.safetensors.index.json").read_text())
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
