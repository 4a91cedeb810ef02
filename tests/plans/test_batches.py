"""Dealing and packing of samples against bounds that any good answer keeps."""

from __future__ import annotations

import random
from itertools import chain

import pytest
from plan_cases import tiny_plan

from plans.batches import assign, evenly, micro_batches, packs, share_of
from plans.checks import check_plan
from plans.codec import dump_plan, read_plan
from plans.plan import ExecutionPlan
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
