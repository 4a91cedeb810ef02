"""Dealing and packing of samples against bounds that any good answer keeps."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import chain

import pytest
from plan_cases import tiny_plan
from random_plans import KINDS, random_plan

from plans.batches import (
    assign,
    batch_transfers,
    can_move,
    consumers,
    evenly,
    lengths_from,
    lengths_routes,
    micro_batches,
    packs,
    rank_samples,
    sample_work,
    share_of,
)
from plans.checks import check_plan
from plans.cluster import ClusterSpec, parse_mesh
from plans.codec import dump_plan, read_plan
from plans.library import load_gpu, load_model
from plans.plan import ExecutionPlan, PlannedCall
from plans.program import StepKind, compile_program
from plans.strategy import ParallelStrategy


def long_tail(count: int, longest: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [min(longest, 1 + int(draw.lognormvariate(3.0, 1.0))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_packs_keep_the_bound_and_are_few(seed: int) -> None:
    tokens = long_tail(60, 200, seed)
    found = packs(tokens, 256)
    assert sorted(chain(*found)) == list(range(60))
    assert all(sum(tokens[i] for i in part) <= 256 for part in found)
    fewest = -(-sum(tokens) // 256)
    assert len(found) <= 11 / 9 * fewest + 1


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_even(seed: int) -> None:
    work = long_tail(40, 200, seed)
    loads = [sum(work[i] for i in part) for part in evenly(work, 4)]
    assert sum(loads) == sum(work)
    assert max(loads) - min(loads) <= max(work), "the last one dealt went to the least"


def plan(strategy: str = "d2 t1 p1", **settings: int) -> ExecutionPlan:
    return tiny_plan(2, dict.fromkeys(CALLS, ("node 0", strategy, settings)) | {"actor_generate": "d2 t1 p1"})


CALLS = ("ref_infer", "critic_infer", "actor_train", "critic_train")
LENGTHS = [16, 2, 3, 2, 16, 2, 2, 3]


def test_minibatches_stay_and_shares_are_balanced() -> None:
    p = plan()
    layout, workload = p.layout("actor_train"), p.workload
    shares = assign(workload, "actor_train", layout, LENGTHS)
    for m, block in enumerate([range(4), range(4, 8)]):
        assert sorted(chain(*(share[m] for share in shares))) == list(block)
    assert shares[0][0] == (0,) and shares[1][0] == (1, 2, 3)
    static = assign(workload, "actor_train", layout)
    assert static == (((0, 1), (4, 5)), ((2, 3), (6, 7)))
    assert assign(workload, "actor_train", layout, [5] * 8) == static, "equal lengths move nothing"
    assert assign(workload, "actor_generate", layout, LENGTHS) == (((0, 1, 2, 3),), ((4, 5, 6, 7),))
    assert 1 < share_of(p, "actor_train", 0, LENGTHS).imbalance < 1.9
    assert share_of(p, "actor_train", 0, [5] * 8).imbalance == 1


def test_pairs_stay_together() -> None:
    places = {"ref_infer": "d2 t1 p1", "actor_train": ("node 0", "d2 t1 p1", {"micro_batch_tokens": 32})}
    p = tiny_plan(2, places, algorithm="dpo", order=tuple(places), batch_size=4, group_size=2, minibatches=1)
    shares = [share_of(p, "actor_train", rank, LENGTHS) for rank in range(2)]
    for share in shares:
        for part in share.micro_batches[0]:
            rows = [share.passes[0][place] for place in part]
            assert all(b == a + 1 and a % 2 == 0 for a, b in zip(rows[::2], rows[1::2], strict=True))
    assert sorted(chain(*(share.samples for share in shares))) == list(range(8))


def test_more_replicas_than_pairs_leave_some_without() -> None:
    p = tiny_plan(4, "d4 t1 p1", algorithm="dpo", order=("ref_infer", "actor_train"), batch_size=4, group_size=2)
    layout = p.layout("actor_train")
    for lengths in (None, LENGTHS):
        shares = assign(p.workload, "actor_train", layout, lengths)
        for first, part in zip((0, 4), zip(*shares, strict=True), strict=True):
            assert sorted(part) == [(), (), (first, first + 1), (first + 2, first + 3)]


def test_stages_with_chunks_have_whole_rounds() -> None:
    strategy = ParallelStrategy(dp=2, pp=2, vpp=2, micro_batch_tokens=16)
    found = micro_batches(strategy, [(0, 1), (2, 3, 4)], [16, 16, 16, 16, 16])
    assert [len(parts) for parts in found] == [4, 4] and found[0][2:] == [(), ()]


def test_a_bound_is_in_the_plan_file_and_checked() -> None:
    p = plan(micro_batch_tokens=32)
    again, problems = read_plan(dump_plan(p))
    assert not problems and again == p and '"micro_batch_tokens": 32' in dump_plan(p)
    text = dump_plan(p).replace('"micro_batch_tokens": 32', '"micro_batch_tokens": 15, "micro_batches": 2', 1)
    bad, _ = read_plan(text)
    assert bad is not None
    found = [problem for problem in check_plan(bad) if problem.rule == "token-bound"]
    assert len(found) == 2 and "longest sample, 16 tokens" in found[1].message
    assert found[1].hint == "micro_batch_tokens 16 or more" and found[1].path == ("calls", 1, "micro_batch_tokens")


def test_work_of_a_sample_by_hand() -> None:
    """Multiply-adds of Llama-2 7B: 6.476e9 weights in blocks once per token, 32 x 4096 of both products of attention
    per pair; of Mixtral's eight experts a token visits two."""
    llama = load_model("llama2-7b")
    block = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    assert sample_work(llama, 1000) == 32 * (1000 * block + 1000 * 1000 * 4096)
    mixtral = load_model("mixtral-8x7b")
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    active = attention + 2 * 3 * 4096 * 14336 + 4096 * 8 + 2 * 4096
    assert sample_work(mixtral, 10) == 32 * (10 * active + 10 * 10 * 4096)
    plain = replace(mixtral, gated_mlp=False)
    assert sample_work(plain, 1) == 32 * (active - 2 * 4096 * 14336 + 4096)


def test_the_share_of_a_rank_by_hand() -> None:
    """Lengths 16 against 2 + 3 + 2, then 16 against 2 + 2 + 3: the imbalance is that of the work."""
    p = plan()
    spec = p.workload.spec("actor_train")
    heavy = 2 * sample_work(spec, 16)
    light = sum(sample_work(spec, n) for n in (2, 3, 2, 2, 2, 3))
    shares = [share_of(p, "actor_train", rank, LENGTHS) for rank in range(2)]
    assert {share.samples for share in shares} == {(0, 4), (1, 2, 3, 5, 6, 7)}
    assert shares[0].imbalance == pytest.approx(2 * heavy / (heavy + light))
    assert shares[1].micro_batches == (((0, 1, 2),), ((0, 1, 2),))


def two_nodes(**places: tuple[str, str]) -> ExecutionPlan:
    """The small PPO plan on two nodes of two GPUs."""
    base = tiny_plan(2, "d2 t1 p1")
    cluster = ClusterSpec(nodes=2, gpus_per_node=2, gpu=load_gpu("cpu"), inter_node_gbps=1)
    calls = tuple(
        PlannedCall(
            call=planned.call,
            mesh=parse_mesh(places.get(planned.call, ("nodes 0-1", ""))[0], cluster),
            strategy=replace(planned.strategy, **degrees(places.get(planned.call, ("", "d4 t1 p1"))[1])),
        )
        for planned in base.calls
    )
    found = replace(base, cluster=cluster, calls=calls)
    assert check_plan(found) == []
    return found


def degrees(text: str) -> dict[str, int]:
    names = {"d": "dp", "t": "tp", "p": "pp"}
    return {names[part[0]]: int(part[1:]) for part in text.split()}


PLACES: tuple[dict[str, tuple[str, str]], ...] = (
    {},
    {"ref_infer": ("node 0", "d1 t2 p1"), "critic_infer": ("node 1", "d2 t1 p1")},
    {"actor_generate": ("node 0", "d2 t1 p1"), "actor_train": ("nodes 0-1", "d2 t1 p2")},
    {"actor_generate": ("nodes 0-1", "d2 t2 p1"), "critic_train": ("node 1 gpu 0", "d1 t1 p1")},
    {"actor_generate": ("node 1", "d1 t2 p1"), "ref_infer": ("node 1 gpu 1", "d1 t1 p1")},
)


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_messages_bring_every_row_once_from_a_rank_that_made_it(
    places: dict[str, tuple[str, str]], lengths: list[int] | None
) -> None:
    """Under any layouts: all that is read arrives, nothing twice, and from the target's own node where it can."""
    p = two_nodes(**places)
    graph = p.workload.graph
    for producer in (planned.call for planned in p.calls):
        made = rank_samples(p, producer, lengths)
        arrived: set[tuple[int, str, int]] = {(rank, key, row) for rank, rows in made.items() for row in rows
                                              for key in graph.call(producer).outputs}  # fmt: skip
        found = batch_transfers(p, producer, lengths)
        readers = {
            call.name: [key for key in call.inputs if key in graph.call(producer).outputs] for call in graph.calls
        }
        expected = {name: keys for name, keys in readers.items() if keys and graph.host(name) != producer}
        assert dict(consumers(p, producer)) == {name: tuple(keys) for name, keys in expected.items()}
        for consumer, messages in found.items():
            for message in messages:
                assert set(message.rows) <= set(made[message.source]) and message.source != message.target
                near = {rank // 2 for rank, rows in made.items() if message.rows[0] in rows}
                assert message.source // 2 == message.target // 2 or message.target // 2 not in near
                parts = {(message.target, key, row) for key in message.keys for row in message.rows}
                assert not parts & arrived, "sent twice, or to a rank that made it"
                arrived |= parts
            for rank, rows in rank_samples(p, consumer, lengths).items():
                assert {(rank, key, row) for key in readers[consumer] for row in rows} <= arrived
            if messages:
                assert can_move(p, producer, consumer)


@pytest.mark.parametrize("places", PLACES)
def test_lengths_reach_every_rank_that_deals_by_them(places: dict[str, tuple[str, str]]) -> None:
    p = two_nodes(**places)
    makers = set(p.layout("actor_generate").ranks)
    routes = lengths_routes(p, "actor_generate")
    assert set(routes) == {rank for planned in p.calls for rank in p.ranks(planned.call)} - makers
    for target, source in routes.items():
        assert source in makers
        assert source // 2 == target // 2 or not any(rank // 2 == target // 2 for rank in makers)
    assert {lengths_from(p, call) for call in ("actor_generate", *CALLS)} == {"actor_generate"}


def test_given_responses_have_no_generation_behind_them() -> None:
    places = {"ref_infer": "d2 t1 p1", "actor_train": "d2 t1 p1"}
    p = tiny_plan(2, places, algorithm="dpo", order=tuple(places), batch_size=4, group_size=2, minibatches=1)
    assert lengths_from(p, "ref_infer") == lengths_from(p, "actor_train") == ""


@pytest.mark.parametrize("seed", range(12, 100, len(KINDS)))
def test_who_sends_or_gets_rows_knows_their_lengths(seed: int) -> None:
    """ReMax with a Python reward: the scores of greedy responses travel, and nothing else of them does."""
    found = random_plan(seed).plan
    graph = found.workload.graph
    assert graph.name == "remax" and graph.call("reward_greedy").model == ""
    for step in compile_program(found).steps:
        if step.kind is StepKind.TRANSFER:
            generate = lengths_from(found, step.subject)
            knows = {*found.layout(generate).ranks, *lengths_routes(found, generate)}
            assert set(step.ranks) <= knows, (step.name, generate)
