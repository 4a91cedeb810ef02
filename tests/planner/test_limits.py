"""Rules of a search: every field of a strategy and of a mesh can be pinned and forbidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import pytest

from cost_models.engines.engine import MEGATRON
from planner.request import build_request
from planner.space.layouts import Pruned
from planner.space.limits import FIELDS, parse_limits, parse_rule
from planner.space.pins import allowed, positions_for, shapes_for, with_pinned
from planner.space.pricing import Space, build_space, layouts_of
from plans.checks import CALL_CHECKS
from plans.errors import Infeasible, SpecError
from plans.library import load_cluster
from plans.plan import ExecutionPlan, PlannedCall
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


def space_of(*pins: str, forbids: Sequence[str] = ()) -> Space | Infeasible:
    """The space of four 7B models under some rules."""
    request = build_request(models={"actor": "llama-7b"}, gpus=8)
    calls = [call.name for call in request.workload.graph.model_calls]
    return build_space(request.workload, request.cluster, MEGATRON, parse_limits(pins, forbids, [], "", calls))


@pytest.mark.parametrize(
    ("pins", "forbids", "words", "hint"),
    [
        (["actor_train.tp=3"], [], "tp 3 does not divide the 32 KV heads of llama2-7b", "tp one of 1, 2, 4, 8"),
        (["actor_train.tp=16"], [], "tp 16 does not divide the 8 GPUs of the mesh", "tp one of 1, 2, 4, 8"),
        (["actor_train.gpus=3"], [], "a part of a node has a power-of-two size", "gpus one of 1, 2, 4, 8"),
        (["actor_train.gpus=12"], [], "12 GPUs are not whole nodes of 8", "gpus one of 1, 2, 4, 8"),
        (["actor_train.mesh=node 1"], [], "reaches node 1; the cluster has nodes 0-0", "a mesh inside `node 0`"),
        (["actor_train.pp=64"], [], "pp 64 is more than the 32 layers", "pp one of 1, 2, 4, 8"),
        (["actor_train.ep=2"], [], "ep 2 does not divide the 0 experts of llama2-7b", "ep one of 1"),
        (["actor_train.micro_batches=7"], [], "micro_batches 7 does not divide the 16 samples", "1, 2, 4, 8, 16, 32"),
        (["actor_train.waves=3"], [], "waves 3 does not apply to a call of kind train_step", "leave out `waves`"),
        (["actor_train.tp>8"], [], "--pin actor_train.tp>8: no layout of `actor_train` has it", "tp one of 1, 2, 4, 8"),
        (
            ["*.tp=4", "actor_train.gpus=2"],
            [],
            "--pin actor_train.gpus=2 beside --pin *.tp=4: no layout",
            "gpus one of 4, 8 beside --pin *.tp=4; or drop --pin *.tp=4",
        ),
        (
            ["actor_train.tp=8"],
            ["*.tp>4"],
            "--forbid *.tp>4 beside --pin actor_train.tp=8: every layout",
            "tp one of 8",
        ),
        (
            ["actor_train.gpus=1", "actor_train.offload=false"],
            [],
            "GiB per GPU under actor_train.gpus=1, actor_train.offload=false; 78.3 GiB are usable",
            "more memory",
        ),
    ],
)
def test_rules_that_leave_nothing_are_named(pins: list[str], forbids: list[str], words: str, hint: str) -> None:
    found = space_of(*pins, forbids=forbids)
    assert isinstance(found, Infeasible)
    assert words in found.reason and hint in found.hint, found


@pytest.mark.parametrize(
    "rule",
    [
        "actor_train.sequence_parallel=false",
        "actor_train.micro_batch_tokens=4096",
        "actor_generate.slots=5",
        "actor_train.vpp=8",
        "critic_train.mesh=node 2 gpus 4-7",
        "critic_train.first_node=2",
    ],
)
def test_what_is_legal_can_be_pinned_though_no_optimum_needs_it(rule: str) -> None:
    """Layouts that others beat, settings that the space does not try, and places that are like others."""
    request = build_request(models={"actor": "llama-7b"}, gpus=32)
    work, cluster = request.workload, request.cluster
    limits = parse_limits([rule], [], [], "", [call.name for call in work.graph.model_calls])
    (parsed,) = limits.pins
    shapes = shapes_for(parsed.call, cluster, limits)
    tried = layouts_of(work, parsed.call, MEGATRON, Pruned(), shapes)
    kept = allowed(parsed.call, with_pinned(parsed.call, tried, work, cluster, limits), cluster, limits, Pruned())
    meshes = [(mesh, s) for shape, s in kept for mesh in positions_for(parsed.call, shape, cluster, limits)]
    found = [entry for entry in meshes if parsed.holds(*entry, cluster)]
    assert found
    call = PlannedCall(call=parsed.call, mesh=found[-1][0], strategy=found[-1][1])
    plan = ExecutionPlan(workload=work, cluster=cluster, calls=(call,))
    assert not [problem for check in CALL_CHECKS for problem in check(plan, call, work.spec(parsed.call))]


def test_a_pinned_layout_that_others_beat_is_in_the_space() -> None:
    found = space_of("actor_train.recompute=full")
    assert isinstance(found, Space) and {s.recompute for _, s in found.options["actor_train"]} == {Recompute.FULL}
    assert found.pruned["pinned: actor_train.recompute=full"]
