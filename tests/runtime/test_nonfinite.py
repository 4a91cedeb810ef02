"""Numbers that are not finite: named before they change a weight, never exported, never in a file that is JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from plan_cases import tiny_plan
from ranks import run_ranks
from tiny_models import build, layout_of, mixed_sequences

from plans.errors import RealplanError
from plans.model import ModelSpec
from plans.program import compile_program
from runtime.executor import check_finite
from runtime.groups import GroupCache
from runtime.models.installation import install
from runtime.models.model import named_shards, nonfinite_parameter
from runtime.passes.forward import TokenOutput
from runtime.passes.packs import Batch
from runtime.passes.training import AdamSettings, BadStep, Trainer
from runtime.reports.metrics import MetricsLog, json_line
from runtime.reports.records import Record
from runtime.reports.stats import Stat
from runtime.weights.hf import random_weights

CPU = torch.device("cpu")
SPEC = ModelSpec(name="tiny", layers=2, hidden=32, heads=2, kv_heads=2, head_dim=16, ffn=48, vocab=130)


def spoilt(kind: str) -> object:
    """A loss whose value, or whose gradient alone, is not a number on the last replica."""

    def loss(out: TokenOutput, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        value = out.logprobs.sum()
        if not kind or not batch["spoilt"].any():
            return value, {"loss": value}
        if kind == "loss":
            return value * math.nan, {"loss": value * math.nan}
        return value * math.inf, {"loss": value.detach()}

    return loss


@pytest.mark.parametrize("degrees", [{"dp": 2}, {"pp": 2}], ids=str)
def test_every_rank_stops_or_skips_alike_and_nothing_changes(degrees: dict[str, int]) -> None:
    sequences = mixed_sequences(4, prompt=6, response=6, vocab=130)
    spoils = torch.repeat_interleave(torch.tensor([0, 0, 0, 1]), torch.tensor(sequences.responses)).bool()
    batch = Batch(sequences, {"spoilt": spoils})

    def work() -> list[str]:
        install(CPU)
        model = build(GroupCache(CPU), layout_of(SPEC, **degrees))
        assert model is not None
        random_weights(model, 0)
        trainer = Trainer(model, AdamSettings(lr=1e-3))
        share = 4 // model.layout.dp
        own = batch.take(range(model.place.dp * share, (model.place.dp + 1) * share))
        before = {p.name: held.detach().clone() for p, held in named_shards(model)}
        said = []
        for kind in ("loss", "gradient"):
            with pytest.raises(BadStep) as raised:
                trainer.step(own, spoilt(kind))  # type: ignore[arg-type]
            skipped = trainer.step(own, spoilt(kind), skip_nonfinite=True)  # type: ignore[arg-type]
            assert skipped.skipped == raised.value.what and not skipped.terms
            said.append(raised.value.message)
        assert trainer.steps == 0
        assert all(torch.equal(held, before[p.name]) for p, held in named_shards(model))
        good = trainer.step(own, spoilt(""))  # type: ignore[arg-type]
        assert math.isfinite(good.grad_norm) and trainer.steps == 1
        assert not all(torch.equal(held, before[p.name]) for p, held in named_shards(model))
        return said

    for said in run_ranks(2, work):
        assert said[0].startswith("loss is nan; nothing was changed"), said
        assert said[1].startswith(("the gradient norm is nan", "the gradient norm is inf")), said


def test_a_weight_is_named() -> None:
    def work() -> None:
        install(CPU)
        model = build(GroupCache(CPU), layout_of(SPEC))
        assert model is not None
        random_weights(model, 0)
        assert nonfinite_parameter(model) == ""
        for value in (math.nan, math.inf, -math.inf):
            name, held = [(p.name, held) for p, held in named_shards(model)][3]
            kept = held.data.view(-1)[-1].clone()
            held.data.view(-1)[-1] = value
            with pytest.raises(RealplanError, match="the weights of `actor` are not finite: ") as raised:
                check_finite(model, "the weights of `actor`")
            assert name in raised.value.message
            held.data.view(-1)[-1] = kept

    run_ranks(1, work)


def test_metrics_are_json(tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    line = json_line({"a": 1.0, "b": math.nan, "c": math.inf})
    assert json.loads(line, parse_constant=refuse) == {"a": 1.0, "b": None, "c": None}
    program = compile_program(tiny_plan(1, "d1 t1 p1"))
    log = MetricsLog(program, tmp_path / "metrics.jsonl")
    memory = {"memory/device_gb": Stat.one(1.0), "memory/host_gb": Stat.one(1.0)}
    log.add([Record(0, 0, (("actor_generate", "call", 0.0, 1.0),), {**memory, "critic/score": Stat.one(math.nan)})])
    (written,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(written, parse_constant=refuse)["critic/score/mean"] is None
