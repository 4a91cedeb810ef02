"""Hugging Face folders in and out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_models import build, layout_of, mixed_sequences, save_tiny, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from plans.huggingface import spec_from_config, spec_from_folder
from plans.layout import Layout
from plans.model import ModelSpec
from runtime.groups import GroupCache
from runtime.models import installation
from runtime.models.model import named_shards
from runtime.passes.forward import sample_scores
from runtime.weights.export import export
from runtime.weights.hf import load_weights, random_weights
from runtime.weights.hf_files import INDEX, WeightFiles, WeightsError
from runtime.weights.hf_folder import weight_files

CPU = torch.device("cpu")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi3", "mixtral", "qwen2-moe", "qwen3-moe"])
def test_round_trip_is_bit_identical(kind: str, tmp_path: Path):
    source = tmp_path / "source"
    reference = save_tiny(kind, source)
    (source / "tokenizer.json").write_text("{}")
    spec = spec_from_folder(source)
    ep = 2 if spec.experts else 1
    layouts = [
        *(layout_of(spec, **degrees) for degrees in ({"tp": 2, "pp": 2, "ep": ep}, {"dp": 2, "tp": 2, "ep": ep * ep})),
        Layout(spec, (2, 3), pp=2, vpp=2),
        layout_of(spec),
    ]

    def write() -> None:
        """Ranks 0 and 1 see one folder, the others have folders of their own."""
        installation.install(CPU)
        groups, seen = GroupCache(CPU), (tmp_path, tmp_path, *(tmp_path / f"rank{rank}" for rank in (2, 3)))
        for i, layout in enumerate(layouts):
            model = build(groups, layout)
            if model is not None:
                load_weights(model, source)
            size = 10**5 if len(layout.ranks) > 1 else 10**9
            export(layout, model, seen[dist.get_rank()] / f"out{i}", source, dtype=torch.float32, shard_bytes=size)

    run_ranks(4, write)
    original = tensors(source)
    for i in range(len(layouts)):
        folder = tmp_path / f"out{i}"
        written = tensors(folder)
        assert written.keys() == original.keys()
        assert all(torch.equal(written[name], original[name]) for name in original)
        assert (folder / "tokenizer.json").is_file()
    assert (tmp_path / "out3" / "model.safetensors").is_file()
    assert not list(tmp_path.rglob(".*")) and not list(tmp_path.glob("rank*"))
    tokens = torch.arange(1, 20)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out0")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, reference(tokens).logits, rtol=0, atol=1e-5)


def test_a_second_export_moves_the_first_aside(tmp_path: Path):
    spec = ModelSpec(name="tiny", layers=2, hidden=32, heads=2, kv_heads=2, head_dim=16, ffn=48, vocab=130)

    def write() -> None:
        installation.install(CPU)
        model = build(GroupCache(CPU), layout_of(spec))
        assert model is not None
        for seed in (1, 2):
            random_weights(model, seed)
            size = 10**9 if seed == 2 else 10**4
            export(model.layout, model, tmp_path / "out", dtype=torch.float32, shard_bytes=size)
            export(model.layout, model, tmp_path / "best", dtype=torch.float32, shard_bytes=size, keeps=False)

    run_ranks(1, write)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    usual = (tmp_path / "out" / "config.json").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {usual}
    assert len(list((tmp_path / "out.1").glob("*.safetensors"))) > 1, "the first had shards"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "out", "out.1"]
    assert tensors(tmp_path / "best").keys() == tensors(tmp_path / "out").keys()
    assert spec_from_folder(tmp_path / "out").vocab == 130
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight.shape == (130, 32)


def test_value_head_from_a_language_model_starts_from_zero_and_returns(tmp_path: Path):
    save_tiny("llama", tmp_path / "lm")
    spec = spec_from_folder(tmp_path / "lm").with_value_head()
    batch = mixed_sequences(2, prompt=6, response=6)

    def write() -> tuple[torch.Tensor, torch.Tensor]:
        installation.install(CPU)
        model = build(GroupCache(CPU), layout_of(spec, pp=2))
        assert model is not None
        with pytest.raises(WeightsError, match=r"has no value head .*scores 0"):
            load_weights(model, tmp_path / "lm", trained=False)
        load_weights(model, tmp_path / "lm")
        zero = sample_scores(model, batch)
        with torch.no_grad():
            for parameter, tensor in named_shards(model):
                if parameter.name == "output_layer.weight":
                    tensor.copy_(torch.linspace(-1, 1, spec.hidden)[None])
        export(model.layout, model, tmp_path / "critic", tmp_path / "lm", dtype=torch.float32)
        load_weights(model, tmp_path / "critic", trained=False)
        return zero, sample_scores(model, batch)

    zero, values = run_ranks(2, write)[0]
    assert not zero.any()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    prompt, response = batch.texts()[0]
    with torch.no_grad():
        expected = loaded(torch.tensor([prompt + response])).logits[0, 0]
    torch.testing.assert_close(values[0], expected, rtol=1e-5, atol=1e-5)


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
    real = WeightFiles.tensor
    monkeypatch.setattr(WeightFiles, "tensor", lambda self, name, shape: Counting(real(self, name, shape)))

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
        WeightFiles(tmp_path)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path):
    save_file({"model.norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    checkpoint = WeightFiles(tmp_path)
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
        export(model.layout, model, tmp_path / "out", dtype=torch.float32)

    run_ranks(2, write)
    ours = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    theirs = json.loads((tmp_path / "source" / "model.safetensors.index.json").read_text())
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]


def small_folder(folder: Path, kind: str = "llama", **overrides: object) -> tuple[ModelSpec, dict[str, torch.Tensor]]:
    """A folder of one file; its architecture and tensors."""
    tiny_model(kind, **overrides).save_pretrained(folder)
    return spec_from_folder(folder), tensors(folder)


def rewrite(folder: Path, held: dict[str, torch.Tensor], **config: object) -> None:
    """Write tensors and keys of the config over a folder."""
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def in_blocks(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix in float8 with a scale per block, block by block: the float8, the scales, and what they stand for."""
    height, width = weight.shape
    scales = torch.empty(-(-height // rows), -(-width // columns))
    small, meant = torch.empty(height, width, dtype=torch.float8_e4m3fn), torch.empty(height, width)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = weight[block].abs().max() / 448
            small[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[block] = small[block].float() * scales[i, j]
    return small, scales, meant


@pytest.mark.parametrize(("rows", "columns", "ending", "quantisation"), [
    (32, 16, "_scale_inv", {"quant_method": "fp8", "weight_block_size": [32, 16]}),
    (128, 128, "_scale_inv", {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}),
    (1, 10**6, "_scale", {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    (10**6, 10**6, "_scale", {"quant_method": "fbgemm_fp8"}),
])  # fmt: skip
def test_scaled_weights_are_what_they_stand_for(
    rows: int, columns: int, ending: str, quantisation: dict[str, object], tmp_path: Path
) -> None:
    spec, held = small_folder(tmp_path)
    meant = {}
    for name, tensor in list(held.items()):
        meant[name] = tensor
        if "_proj" in name:
            held[name], held[name + ending], meant[name] = in_blocks(tensor, rows, columns)
    rewrite(tmp_path, held, quantization_config=quantisation)
    checkpoint = WeightFiles(tmp_path)
    checkpoint.check(spec)
    for name, tensor in meant.items():
        whole = checkpoint.tensor(name, tuple(tensor.shape))
        assert torch.equal(torch.as_tensor(whole[:]).float(), tensor), name
        if tensor.dim() == 2:
            assert torch.equal(whole[7:41, 3:50].float(), tensor[7:41, 3:50])
            assert torch.equal(whole[5:9].float(), tensor[5:9])


def broken_folder(folder: Path, what: str) -> None:
    """A folder of the small Llama with one thing wrong."""
    _, held = small_folder(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    if what == "no scales":
        held[name] = held[name].to(torch.float8_e4m3fn)
    elif what == "wrong scales":
        held[name], held[name + "_scale_inv"] = held[name].to(torch.float8_e4m3fn), torch.ones(3, 5)
    elif what == "bias":
        held["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    elif what == "one layer more":
        held["model.layers.4.input_layernorm.weight"] = torch.ones(64)
    elif what == "no head":
        del held["lm_head.weight"]
    elif what == "wide score":
        held["score.weight"] = torch.ones(2, 64)
    rewrite(folder, held, **({"quantization_config": {"quant_method": "gptq", "bits": 4}} if what == "gptq" else {}))
    if what == "pointer":
        (folder / "model.safetensors").write_bytes(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
        )
    elif what == "cut off":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif what == "another format":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    if not what.startswith("index"):
        return
    places: dict[str, object] = dict.fromkeys(held, "model.safetensors")
    if what == "index without a file":
        places[name] = "model-2.safetensors"
    elif what == "index says more":
        places["model.layers.9.weight"] = "model.safetensors"
    elif what == "index says less":
        del places[name]
    elif what == "index outside":
        places[name] = "../model.safetensors"
    content = json.dumps({} if what == "index without map" else {"weight_map": places})
    (folder / INDEX).write_text(content[:-1] if what == "index cut off" else content)


@pytest.mark.parametrize(("what", "words", "hint"), [
    ("no scales", "`model.layers.1.mlp.up_proj.weight` is F8_E4M3 and has no scales", "in bf16"),
    ("wrong scales", "of shape [96, 64] has scales of shape [3, 5]", "one per block of 128 x 128"),
    ("gptq", "is quantised by `gptq`, which this runtime does not read", "bf16"),
    ("bias", "a tensor `model.layers.0.self_attn.q_proj.bias` that the model of its config.json", "attention_bias"),
    ("one layer more", "a tensor `model.layers.4.input_layernorm.weight` that", "config.json"),
    ("no head", "has no tensor `lm_head.weight`", '"tie_word_embeddings": true'),
    ("pointer", "is a git-LFS pointer", "git lfs pull"),
    ("cut off", "cannot read", "download it again"),
    ("another format", "(it has pytorch_model.bin)", "converted first"),
    ("index without a file", "is in `model-2.safetensors`, which is not there", "download"),
    ("index says more", "says that model.safetensors has `model.layers.9.weight`; it has not", "different downloads"),
    ("index says less", "up_proj.weight`, and the index does not have it", "different downloads"),
    ("index outside", "'../model.safetensors', which is no name of a file beside the index", "weight_map"),
    ("index without map", "index.json:1:1: the index has no `weight_map`", "weight_map"),
    ("index cut off", "not JSON", "comma"),
])  # fmt: skip
def test_folders_that_are_not_what_they_seem(what: str, words: str, hint: str, tmp_path: Path) -> None:
    broken_folder(tmp_path, what)
    with pytest.raises(WeightsError) as raised:
        WeightFiles(tmp_path).check(spec_from_folder(tmp_path))
    assert words in str(raised.value) and hint in str(raised.value)


def test_heads_of_other_roles_are_left_alone(tmp_path: Path) -> None:
    spec, held = small_folder(tmp_path)
    WeightFiles(tmp_path).check(spec.with_value_head())
    rewrite(tmp_path, held | {"v_head.summary.weight": torch.ones(1, 64), "model.rotary_emb.inv_freq": torch.ones(8)})
    WeightFiles(tmp_path).check(spec)
    WeightFiles(tmp_path).check(spec.with_value_head())
    broken_folder(tmp_path, "wide score")
    with pytest.raises(WeightsError, match=r"`score.weight` has shape \[2, 64\]"):
        WeightFiles(tmp_path).check(spec.with_value_head())
