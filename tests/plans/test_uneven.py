"""Pipelines whose stages have different numbers of layers: the split, the file, the rules, what a change moves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from plans.checks import check_plan
from plans.codec import digest, dump_plan, read_plan
from plans.errors import SpecError
from plans.layout import Layout, default_split, model_units
from plans.library import load_model
from plans.plan import ExecutionPlan, PlannedCall
from plans.reallocation import reallocation
from plans.strategy import ParallelStrategy


def test_the_middle_takes_what_does_not_divide() -> None:
    assert default_split(126, 8) == (15, 16, 16, 16, 16, 16, 16, 15)  # Llama-3-405B as its authors trained it
    assert default_split(5, 2) == (3, 2)
    assert default_split(5, 3) == (2, 2, 1)
    assert default_split(7, 3) == (2, 3, 2)
    assert default_split(32, 4) == (8, 8, 8, 8)
    for layers in range(1, 40):
        for pp in range(1, layers + 1):
            split = default_split(layers, pp)
            assert sum(split) == layers and max(split) - min(split) <= 1
            assert split[-1] <= split[0], "the head weighs more than the embedding"


@pytest.mark.parametrize("split", [(), (1, 2, 2), (3, 1, 1)])
def test_stages_hold_every_layer_once(split: tuple[int, ...]) -> None:
    spec = replace(load_model("qwen2.5-0.5b"), layers=5)
    layout = Layout(spec, (0, 1, 2), pp=3, layers_per_stage=split)
    held = [name for stage in range(3) for name in layout.stage_units(stage)]
    tied = ["embedding"]  # the last stage has a copy of the tied embedding
    assert sorted(held) == sorted([unit.name for unit in model_units(spec)] + tied)
    counts = tuple(sum(name.startswith("layer") for name in layout.stage_units(stage)) for stage in range(3))
    assert counts == (split or (2, 2, 1))
    assert layout.chunk_layers(2) == range(5 - counts[2], 5)


def test_layouts_of_different_splits_do_not_share_weights() -> None:
    spec = replace(load_model("llama-7b"), layers=5)
    a, b = Layout(spec, (0, 1), pp=2), Layout(spec, (0, 1), pp=2, layers_per_stage=(2, 3))
    same = Layout(spec, (0, 1), pp=2, layers_per_stage=(3, 2))
    assert a.same_weights(same) and not a.same_weights(b)
    moved = reallocation(a, b, 8)
    (move,) = moved.moves
    layer = next(unit for unit in model_units(spec) if unit.name == "layer.2")
    assert (move.source, move.target, move.piece.unit) == (0, 1, "layer.2")
    assert moved.elements == layer.sharded + layer.replicated
    assert not reallocation(a, same, 8).moves


def _with(plan: ExecutionPlan, call: str, **settings: object) -> ExecutionPlan:
    def changed(planned: PlannedCall) -> PlannedCall:
        return replace(planned, strategy=replace(planned.strategy, **settings)) if planned.call == call else planned

    return replace(plan, calls=tuple(changed(planned) for planned in plan.calls))


def test_a_split_of_ones_own_travels_in_the_plan(plan: ExecutionPlan) -> None:
    own = _with(plan, "actor_train", layers_per_stage=(19, 21, 21, 19))
    assert check_plan(own) == []
    text = dump_plan(own)
    assert '"layers_per_stage": [19, 21, 21, 19]' in text
    assert read_plan(text) == (own, []) and digest(own) != digest(plan)


@pytest.mark.parametrize(
    ("settings", "rule", "message"),
    [
        ({"layers_per_stage": (20, 20, 40)}, "split", "layers_per_stage has 3 stages, pp is 4"),
        ({"layers_per_stage": (20, 20, 20, 19)}, "split", "adds up to 79, llama2-70b has 80 layers"),
        ({"layers_per_stage": (19, 21, 21, 19), "vpp": 2}, "split", "takes no layers_per_stage"),
        ({"vpp": 3}, "layers", "80 layers of llama2-70b do not divide into pp 4 x vpp 3 chunks"),
    ],
)
def test_wrong_splits_are_located(plan: ExecutionPlan, settings: dict[str, object], rule: str, message: str) -> None:
    problems = [p for p in check_plan(_with(plan, "actor_train", **settings)) if p.rule == rule]
    assert len(problems) == 1 and message in problems[0].message and problems[0].hint


def test_a_stage_has_a_layer() -> None:
    with pytest.raises(SpecError, match="a stage without layers"):
        ParallelStrategy(pp=2, layers_per_stage=(0, 2))
