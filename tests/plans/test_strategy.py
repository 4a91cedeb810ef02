"""A field of a strategy is described once: file, schema, rules and words agree with it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from plans.checks import check_plan
from plans.codec import dump_plan, read_plan
from plans.errors import SpecError
from plans.kvcache import slots_per_replica
from plans.plan import ExecutionPlan
from plans.planfile import json_schema
from plans.strategy import KEYS, LETTERS, SETTINGS, ParallelStrategy, Recompute, parse_degrees

OTHER = {int: 2, bool: True, Recompute: Recompute.FULL, tuple: (1, 2)}


def test_every_setting_travels_in_the_file_or_in_the_degrees(plan: ExecutionPlan) -> None:
    assert set(KEYS) | set(LETTERS.values()) == set(SETTINGS)
    for name in KEYS:
        value = not SETTINGS[name].default if SETTINGS[name].type is bool else OTHER[SETTINGS[name].type]
        first = replace(plan.calls[0], strategy=replace(plan.calls[0].strategy, **{name: value}))
        edited = replace(plan, calls=(first, *plan.calls[1:]))
        text = dump_plan(edited)
        assert f'"{name}": ' in text
        assert read_plan(text)[0] == edited
    strategy = ParallelStrategy(dp=2, tp=3, pp=4, cp=5, ep=5, vpp=7)
    assert strategy.degrees == "d2 t3 p4 c5 e5 v7"
    assert ParallelStrategy(**parse_degrees(strategy.degrees)) == strategy


def test_the_schema_has_every_key_with_its_meaning() -> None:
    schema = json_schema()
    keys = schema["$defs"]["CallFile"]["properties"]
    assert {"call", "mesh", "strategy", "lag"} | set(KEYS) == set(keys)
    assert schema["$defs"]["CallFile"]["required"] == ["call", "mesh", "strategy"]
    for name in KEYS:
        assert keys[name]["description"] == SETTINGS[name].meaning
    assert keys["waves"]["minimum"] == 1 and keys["waves"]["maximum"] == 10**6
    assert keys["shard_optimizer"]["default"] is True


@pytest.mark.parametrize(
    ("settings", "words", "hint"),
    [
        ({"slots": 10**5}, "100000 slots for the", "slots 512 or less"),
        ({"slots": 4, "waves": 2}, "say the same thing twice", "leave out `waves`"),
        ({"slots": 4, "pp": 8, "groups": 8}, "4 slots do not fill 8 groups", "slots 8 or more"),
        ({"slots": 4}, "", ""),
    ],
)
def test_slots(plan: ExecutionPlan, settings: dict[str, int], words: str, hint: str) -> None:
    strategy = ParallelStrategy(**settings)
    first = replace(plan.calls[0], strategy=strategy)
    problems = [p for p in check_plan(replace(plan, calls=(first, *plan.calls[1:]))) if p.rule == "slots"]
    assert len(problems) == bool(words)
    for problem in problems:
        assert words in problem.message and hint in problem.hint


def test_waves_mean_slots() -> None:
    assert [slots_per_replica(10, waves=waves) for waves in (1, 3, 4, 99)] == [10, 4, 3, 1]
    assert slots_per_replica(10, slots=6) == 6 and slots_per_replica(10, slots=16) == 10


@pytest.mark.parametrize(
    ("call", "setting", "value"),
    [
        ("actor_generate", "micro_batches", 2),
        ("actor_generate", "recompute", Recompute.FULL),
        ("actor_generate", "shard_optimizer", False),
        ("actor_train", "waves", 2),
        ("actor_train", "groups", 2),
        ("ref_infer", "recompute", Recompute.SELECTIVE),
        ("ref_infer", "groups", 2),
    ],
)
def test_a_call_has_the_settings_of_its_kind_alone(plan: ExecutionPlan, call: str, setting: str, value: object) -> None:
    calls = tuple(
        replace(planned, strategy=replace(planned.strategy, **{setting: value})) if planned.call == call else planned
        for planned in plan.calls
    )
    problems = [p for p in check_plan(replace(plan, calls=calls)) if p.rule == "kind"]
    assert len(problems) == 1 and setting in problems[0].message and setting in problems[0].hint


def test_a_degree_beyond_any_cluster_is_refused() -> None:
    with pytest.raises(SpecError, match="tp is 70000; it must be a whole number from 1 to 65,536"):
        ParallelStrategy(tp=70_000)
    with pytest.raises(SpecError, match="unknown degree `x`"):
        parse_degrees("d2 x4")
