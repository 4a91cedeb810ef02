"""Rules of a search: every field of a strategy and of a mesh can be pinned and forbidden."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from planner.space.limits import FIELDS, parse_rule
from plans.errors import SpecError
from plans.library import load_cluster
from plans.strategy import ParallelStrategy, Recompute

CALLS = ("actor_generate", "actor_train")
CHANGED = {"recompute": Recompute.FULL, "shard_optimizer": False, "sequence_parallel": True, "offload": True}


@pytest.mark.parametrize("name", [field.name for field in fields(ParallelStrategy) if field.name != "layers_per_stage"])
def test_every_field_of_a_strategy_can_be_ruled(name: str) -> None:
    cluster, plain = load_cluster("h100-80gb-sxm", gpus=8), ParallelStrategy(dp=2)
    value = CHANGED.get(name, 4)
    other = replace(plain, **{name: value}) if name != "ep" else ParallelStrategy(dp=4, ep=4)
    rule = parse_rule(f"actor_generate.{name}={value}", CALLS)
    assert rule.holds(cluster.whole, other, cluster) and not rule.holds(cluster.whole, plain, cluster)


def test_rules_of_the_mesh() -> None:
    cluster, strategy = load_cluster("h100-80gb-sxm", gpus=16), ParallelStrategy()
    for text in ("*.gpus=16", "*.nodes=2", "*.first_node<1", '*.mesh="nodes 0-1"'):
        assert parse_rule(text, CALLS).holds(cluster.whole, strategy, cluster), text


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("actor_generate.wave=2", "unknown field `wave`", "`waves`"),
        ("actor_train.recompute=ful", "recompute cannot be `ful`", "`full`"),
        ("actor_train.tp=four", "`four` is not a whole number", ""),
        ("actor_train.offload=4", "`4` is not true or false", ""),
        ("actor_train.recompute>none", "can only be compared with = and !=", ""),
        ("actor_trains.tp=4", "no call `actor_trains`", "`actor_train`"),
    ],
)
def test_a_wrong_rule_names_its_wrong_part(text: str, message: str, hint: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_rule(text, CALLS)
    assert message in caught.value.message and hint in caught.value.hint
    assert "dp" in FIELDS
