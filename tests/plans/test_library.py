"""Named architectures have the parameters that their authors published; every shipped data file loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plans import library
from plans.errors import SpecError
from plans.huggingface import config_from_spec, spec_from_config
from plans.layout import model_units
from plans.library import (
    cluster_names,
    gpu_names,
    load_cluster,
    load_gpu,
    load_model,
    model_names,
)

_DATA = json.loads((Path(library.__file__).parent / "models.json").read_text())
PUBLISHED = {name: _DATA["models"][_DATA["aliases"].get(name, name)]["params_b"] for name in model_names()}
ROUNDED = ("gpt3-", "megatron-22b")  # published with two digits only


@pytest.mark.parametrize("name", model_names())
def test_parameter_counts(name: str) -> None:
    spec = load_model(name)
    if not name.startswith(ROUNDED):
        assert spec.params / 1e9 == pytest.approx(PUBLISHED[name], rel=3e-3)


def test_there_are_forty_architectures_and_every_cluster() -> None:
    assert len(model_names()) >= 40
    for name in cluster_names():
        assert load_cluster(name).size >= 1
    assert {load_gpu(name).name for name in gpu_names()} == set(gpu_names())
    assert load_model("llama-70b").name == "llama2-70b"


@pytest.mark.parametrize(
    "name",
    ["llama2-7b", "llama3.1-8b", "qwen2-0.5b", "qwen3-4b", "mixtral-8x7b", "qwen2-57b-a14b", "bloom-176b", "gpt3-125m"],
)
def test_units_add_up_to_the_parameters(name: str) -> None:
    spec = load_model(name)
    padding = (spec.padded_vocab - spec.vocab) * spec.hidden * (1 if spec.tied_embeddings else 2)
    assert sum(unit.sharded + unit.replicated for unit in model_units(spec)) == spec.params + padding


EXPORTED = (
    "llama2-7b", "llama3.1-8b", "qwen2-0.5b", "qwen3-4b", "smollm2-135m", "mistral-7b-v0.1", "mixtral-8x7b",
    "qwen2-57b-a14b", "qwen3-30b-a3b", "phi-4",
)  # fmt: skip


@pytest.mark.parametrize("name", EXPORTED)
def test_config_json_round_trip(name: str) -> None:
    spec = load_model(name)
    assert spec_from_config(config_from_spec(spec), name) == spec


def test_unknown_names_are_helped() -> None:
    with pytest.raises(SpecError, match="llama-70b"):
        load_model("lama-70b")
    with pytest.raises(SpecError, match="h100-80gb-sxm"):
        load_cluster("h100")
    with pytest.raises(SpecError, match="nodes of 8"):
        load_cluster("h100-80gb-sxm", gpus=12)
    with pytest.raises(SpecError, match="model_type"):
        spec_from_config({"model_type": "mamba"}, "x")
