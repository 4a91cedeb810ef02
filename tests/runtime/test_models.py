"""Models of the runtime against Hugging Face's, and against the layout arithmetic of `plans`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_models import build, layout_of, mixed_sequences, part_shape, save_tiny, tiny_model

from plans.errors import SpecError
from plans.huggingface import spec_from_folder
from plans.layout import Layout, model_units
from plans.model import ModelSpec, Norm, Position
from plans.strategy import Recompute
from runtime.generation.generate import generate
from runtime.generation.sampling import Sampling
from runtime.groups import GroupCache, rank_sets
from runtime.models import installation
from runtime.models.model import alias_parameters, build_model, named_shards
from runtime.models.shards import shard, unshard
from runtime.passes.forward import sample_scores, token_logprobs, token_values
from runtime.sequences import Sequences
from runtime.weights.hf import load_weights, random_weights

CPU = torch.device("cpu")
LAYOUTS = (
    {},
    {"tp": 2},
    {"pp": 2},
    {"tp": 2, "pp": 2},
    {"dp": 2, "tp": 2},
    {"pp": 2, "vpp": 2},
    {"pp": 4},
    {"pp": 3},
    {"tp": 2, "pp": 2, "layers_per_stage": (1, 3)},
)
SPEC = ModelSpec(name="tiny", layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=250)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, tied_embeddings=True),
        SPEC.with_value_head(),
        replace(SPEC, qkv_bias=True),
        replace(SPEC, qk_norm=True, head_dim=32),
        replace(SPEC, norm=Norm.LAYER, linear_bias=True, gated_mlp=False, activation="gelu"),
    ],
    ids=["untied", "tied", "value", "qkv-bias", "qk-norm", "layer-norm"],
)
def test_parameters_are_those_of_the_layout(spec: ModelSpec):
    def built() -> list[tuple[dict[str, int], list[str]]]:
        installation.install(CPU)
        groups = GroupCache(CPU)
        found = []
        for degrees in LAYOUTS:
            layout = layout_of(spec, **degrees)
            model = build(groups, layout)
            if model is not None:
                for parameter, tensor in named_shards(model):
                    assert tuple(tensor.shape) == part_shape(parameter, layout.tp), parameter
                    assert getattr(tensor, "tensor_model_parallel", False) == (parameter.axis is not None), parameter
                found.append((degrees, [parameter.name for parameter, _ in named_shards(model)]))
        return found

    units = {unit.name: unit for unit in model_units(spec)}
    for rank, found in enumerate(run_ranks(4, built)):
        for degrees, names in found:
            layout = layout_of(spec, **degrees)
            expected = layout.rank_units(rank)
            assert names == [p.name for unit in expected for p in units[unit].parameters]


def test_shards_make_a_whole():
    for unit in model_units(SPEC):
        for parameter in unit.parameters:
            whole = torch.randn(parameter.shape)
            parts = [shard(parameter, whole, 2, rank) for rank in range(2)]
            assert tuple(parts[0].shape) == part_shape(parameter, 2)
            assert torch.equal(unshard(parameter, parts), whole)


def test_rank_sets_partition_the_layout():
    layout = Layout(SPEC, tuple(range(8, 16)), dp=2, tp=2, pp=2)
    sets = rank_sets(layout)
    assert sets["tp"] == [(8, 9), (10, 11), (12, 13), (14, 15)]
    assert sets["pp"] == [(8, 12), (9, 13), (10, 14), (11, 15)]
    assert sets["dp"] == [(8, 10), (9, 11), (12, 14), (13, 15)]
    assert sets["mp"] == [(8, 9, 12, 13), (10, 11, 14, 15)]
    for name in ("tp", "pp", "dp", "mp", "dp_cp", "tp_dp_cp", "ep"):
        assert sorted(rank for ranks in sets[name] for rank in ranks) == list(layout.ranks)


def test_layouts_share_communicators():
    def count() -> int:
        groups = GroupCache(CPU)
        groups.collection(layout_of(SPEC, tp=2))
        before = len(groups._groups)
        groups.collection(layout_of(SPEC, pp=2))
        groups.collection(layout_of(SPEC, dp=2))
        made = len(groups._groups) - before
        groups.close()
        return made

    assert run_ranks(2, count) == [0, 0]


@pytest.mark.parametrize(
    ("spec", "degrees", "message"),
    [
        (replace(SPEC, position=Position.LEARNED), {}, "position encoding `learned`"),
        (replace(SPEC, experts=3, experts_per_token=2), {"dp": 2, "ep": 2}, "3 experts, not a multiple of ep 2"),
        (SPEC, {"tp": 4}, "kv_heads 2, not a multiple of tp 4"),
        (SPEC, {"pp": 2, "vpp": 3}, "4 layers, which pp 2 x vpp 3 cannot share"),
    ],
)
def test_what_cannot_run_is_refused(spec: ModelSpec, degrees: dict[str, int], message: str):
    with pytest.raises(SpecError, match=message):
        build_model(layout_of(spec, **degrees), None, device=CPU)


PARTS = {1: None, 2: [[3, 0], [1, 2]], 4: [[0], [1], [2], [3]], 6: [[2], [1], [], [3], [0], []]}
"""Micro-batches of four samples, out of order and some of them empty."""


def parts_for(degrees: dict[str, int]) -> list[tuple[int, Any]]:
    """Micro-batches for a layout: with several chunks per stage, as many as fill its rounds."""
    return [(count, parts) for count, parts in PARTS.items() if "vpp" not in degrees or count % degrees["pp"] == 0]


def reference_logprobs(model: Any, batch: Sequences, temperature: float = 1.0) -> torch.Tensor:
    """Hugging Face's log-probabilities of response tokens, sample by sample."""
    found = []
    with torch.no_grad():
        for prompt, response in batch.texts():
            ids = torch.tensor([prompt + response])
            logprobs = (model(ids).logits[0, :-1].float() / temperature).log_softmax(-1)
            found.append(logprobs.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0])
    return torch.cat(found)


LAYOUTS_OF = {
    "llama": LAYOUTS,
    "llama-tied": (LAYOUTS[3], LAYOUTS[5], LAYOUTS[7]),  # both ends of a pipeline hold the embedding
    **dict.fromkeys(("llama3", "qwen2", "qwen3"), (LAYOUTS[0], LAYOUTS[3])),  # what differs is within a layer
}


@pytest.mark.parametrize("kind", LAYOUTS_OF)
def test_logprobs_equal_hugging_face(kind: str, tmp_path: Path):
    reference = save_tiny(kind, tmp_path)
    batch = mixed_sequences(4, prompt=12, response=10)
    expected = reference_logprobs(reference, batch, temperature=0.7)
    spec = spec_from_folder(tmp_path)

    def errors() -> dict[str, float]:
        installation.install(CPU)
        groups = GroupCache(CPU)
        found = {}
        for degrees in LAYOUTS_OF[kind]:
            for sequence_parallel in (False, True) if degrees.get("tp") else (False,):
                model = build(groups, layout_of(spec, **degrees), sequence_parallel=sequence_parallel)
                if model is None:
                    continue
                load_weights(model, tmp_path)
                for count, parts in parts_for(degrees):
                    got = token_logprobs(model, batch, micro_batches=parts, temperature=0.7)
                    key = f"{degrees} {sequence_parallel} {count}"
                    found[key] = float((got - expected).abs().max())
        return found

    for found in run_ranks(4, errors):
        assert max(found.values()) < 1e-5, found


def test_values_equal_hugging_face(tmp_path: Path):
    reference = save_tiny("reward", tmp_path)
    batch = mixed_sequences(4, prompt=12, response=10)
    values, scores = [], []
    with torch.no_grad():
        for prompt, response in batch.texts():
            found = reference.score(reference.model(torch.tensor([prompt + response])).last_hidden_state)[0, :, 0]
            values.append(found[len(prompt) - 1 : -1])
            scores.append(found[-1:])
    expected = torch.cat(values + scores)
    spec = spec_from_folder(tmp_path).with_value_head()

    def errors() -> dict[str, float]:
        installation.install(CPU)
        groups = GroupCache(CPU)
        found = {}
        for degrees in (LAYOUTS[i] for i in (0, 3, 5, 7)):  # a value head is whole, on the last stage
            model = build(groups, layout_of(spec, **degrees), sequence_parallel=True)
            if model is not None:
                load_weights(model, tmp_path)
                for count, parts in parts_for(degrees):
                    got = torch.cat(
                        [score(model, batch, micro_batches=parts) for score in (token_values, sample_scores)]
                    )
                    found[f"{degrees} {count}"] = float((got - expected).abs().max())
        return found

    for found in run_ranks(4, errors):
        assert max(found.values()) < 1e-5, found


def test_bfloat16_is_near_hugging_face(tmp_path: Path):
    reference = save_tiny("llama", tmp_path).to(torch.bfloat16)
    batch = mixed_sequences(4, prompt=12, response=10)
    expected = reference_logprobs(reference, batch)
    exact = reference_logprobs(tiny_model("llama"), batch)
    spec = spec_from_folder(tmp_path)

    def logprobs() -> torch.Tensor:
        installation.install(CPU)
        model = build(GroupCache(CPU), layout_of(spec, tp=2), dtype=torch.bfloat16, sequence_parallel=True)
        assert model is not None
        load_weights(model, tmp_path)
        return token_logprobs(model, batch)

    got = run_ranks(2, logprobs)[0]
    rounding = (expected - exact).abs().mean()
    assert (got - exact).abs().mean() < 1.5 * rounding


def test_random_weights_do_not_depend_on_the_layout():
    batch = mixed_sequences(2, prompt=6, response=6)

    def logprobs() -> list[torch.Tensor]:
        installation.install(CPU)
        groups = GroupCache(CPU)
        found = []
        for degrees in LAYOUTS:
            model = build(groups, layout_of(SPEC, **degrees))
            if model is not None:
                random_weights(model, seed=3)
                found.append(token_logprobs(model, batch, micro_batches=[[1], [0]]))
        return found

    results = [found for rank in run_ranks(4, logprobs) for found in rank]
    assert float(results[0].std()) > 0
    for found in results:
        torch.testing.assert_close(found, results[0], rtol=0, atol=1e-5)


def test_a_view_shares_weights_and_generates(tmp_path: Path):
    """A training model with sequence parallel and recomputation lends its weights to a model that generates."""
    reference = save_tiny("llama", tmp_path)
    prompt = torch.arange(1, 9)[None]
    words = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = reference.generate(prompt, attention_mask=torch.ones_like(prompt), **words)[0].tolist()
    spec = spec_from_folder(tmp_path)

    def decode() -> list[int]:
        installation.install(CPU)
        groups = GroupCache(CPU)
        layout = layout_of(spec, tp=2)
        training = build(groups, layout, sequence_parallel=True, recompute=Recompute.FULL)
        view = build(groups, layout)
        assert training is not None and view is not None
        alias_parameters(training, view)
        load_weights(training, tmp_path)
        greedy = Sampling(temperature=0)
        made = generate(view, prompt.tolist(), [0], response_tokens=6, sampling=greedy, seed=0, iteration=0)
        token_logprobs(training, mixed_sequences(2, prompt=6, response=6))
        return list(made.sequences.tokens.tolist())

    assert run_ranks(2, decode) == [expected] * 2
