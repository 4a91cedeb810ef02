"""Slots that refill, packs and their imbalance, against event loops and enumeration."""

from __future__ import annotations

import random
from collections import deque
from itertools import product

import numpy as np
import pytest

from cost_models.candidates import Candidates
from cost_models.engines.engine import MEGATRON, NamedEngine
from cost_models.memory.memory import call_memory
from cost_models.packing import attended, bound_tokens, packed, packing_of
from cost_models.slots import decode_moments
from cost_models.time.calls import call_time
from plans.algorithms import ppo
from plans.batches import evenly, packs, sample_work
from plans.cluster import DeviceMesh
from plans.kvcache import cache_blocks
from plans.lengths import Lengths
from plans.library import load_cluster, load_model
from plans.strategy import ParallelStrategy
from plans.workload import Workload

MEASURED = Lengths.measured([min(1024, max(1, int(random.Random(i).lognormvariate(5, 1)))) for i in range(999)], 1024)
LLAMA = load_model("llama2-7b")
H100 = load_cluster("h100-80gb-sxm", gpus=8)


def played(lengths: list[int], slots: int, burst: int) -> tuple[int, int, float]:
    """Steps of a replica in bursts, rows computed, and the sum of the rows' tokens so far."""
    queue, live = deque(lengths), list[list[int]]()
    steps = rows = 0
    tokens = 0.0
    while queue or live:
        while queue and len(live) < slots:
            live.append([queue.popleft(), 0])
        count = min(burst, max(length - done for length, done in live))
        steps, rows = steps + count, rows + count * len(live)
        for one in live:
            tokens += count * one[1] + count * (count - 1) / 2
            one[1] += count
        live = [one for one in live if one[1] < one[0]]
    return steps, rows, tokens


def reckoned(lengths: Lengths, rows: int, slots: int, burst: float) -> tuple[float, float, float]:
    """The same by the closed form."""
    steps = computed = tokens = 0.0
    for moment in decode_moments(lengths, np.array([float(rows)]), np.array([float(slots)]), first=0.0, burst=burst):
        area = float((moment.weight * moment.alive * moment.slots)[0])
        steps += float((moment.weight * moment.running(np.ones(1)))[0])
        computed, tokens = computed + area, tokens + area * float(moment.position[0])
    return steps, computed, tokens


@pytest.mark.parametrize(
    "lengths", [Lengths(1024, 256), Lengths(1024, 600), MEASURED], ids=["tail", "mild", "measured"]
)
@pytest.mark.parametrize(("rows", "slots", "burst"), [(64, 64, 1), (64, 16, 8), (100, 64, 8), (512, 32, 8)])
def test_slots_that_refill_take_what_an_event_loop_takes(lengths: Lengths, rows: int, slots: int, burst: int) -> None:
    games = []
    for seed in range(40):
        rng = random.Random(seed)
        drawn = [max(1, round(lengths.quantile(rng.random()))) for _ in range(rows)]
        games.append(played(drawn, slots, burst))
    means = np.mean(games, axis=0)
    # Forty games of a long tail scatter by a percent or two themselves.
    assert reckoned(lengths, rows, slots, burst) == pytest.approx(means, rel=0.05)


@pytest.mark.parametrize(("rows", "slots"), [(64, 64), (64, 16), (100, 64)])
def test_equal_responses_refill_all_slots_at_once(rows: int, slots: int) -> None:
    exact = played([256] * rows, slots, 8)
    assert reckoned(Lengths(256), rows, slots, 8.0) == pytest.approx(exact, rel=5e-3)


def test_a_queue_longer_than_the_table_goes_on_at_the_steady_rate() -> None:
    lengths = Lengths(1024, 256)
    near, far = (reckoned(lengths, rows, 4, 1.0) for rows in (400, 404))
    assert far[0] - near[0] == pytest.approx(lengths.mean, rel=0.01)


def workload(**sizes: int) -> Workload:
    graph = ppo()
    return Workload(graph=graph, models=dict.fromkeys(graph.roles, LLAMA), **sizes)  # type: ignore[arg-type]


def candidates(**settings: int) -> Candidates:
    mesh = DeviceMesh(first_node=0, nodes=1, first_gpu=0, gpus=8)
    return Candidates.of([(mesh, ParallelStrategy(**settings))])


def test_the_attended_length_is_that_of_equal_samples_with_the_same_work() -> None:
    prompts, responses = Lengths(64), Lengths(1024, 256)
    drawn = [64 + x for x in responses.draw(4000)]
    assert attended(prompts, responses) == pytest.approx(sum(n * n for n in drawn) / sum(drawn), rel=5e-3)
    assert attended(Lengths(64), Lengths(100)) == 164


def test_imbalance_and_fullest_pack_are_those_of_the_best_deal() -> None:
    work = workload(batch_size=8, minibatches=1, prompt_tokens=16, response_tokens=512, mean_response_tokens=128)
    lengths = [16 + r for r in work.responses.draw(8, seed=1)]
    cost = [sample_work(LLAMA, n) for n in lengths]
    mean = sum(cost) / 2
    busiest = min(
        max(sum(c for c, side in zip(cost, sides, strict=True) if side == rank) for rank in (0, 1))
        for sides in product((0, 1), repeat=8)
    )
    found = packing_of(work, "actor_train", candidates(dp=2, tp=4, micro_batches=2))
    assert busiest / mean <= float(np.ravel(found.imbalance)[0]) <= 4 / 3 * busiest / mean
    shares = evenly(cost, 2)
    full = max(max(sum(lengths[i] for i in part) for part in _halves(share)) for share in shares)
    assert 1.0 <= float(np.ravel(found.fullest)[0]) <= full * 2 * 2 / sum(lengths)


def _halves(share: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [share[::2], share[1::2]]


def test_training_costs_real_tokens_and_what_is_dealt_unevenly() -> None:
    full = workload(response_tokens=4096)
    tailed = workload(response_tokens=4096, mean_response_tokens=512)
    machine = NamedEngine("megatron-te").on(H100, "bf16")  # by formulas: nothing depends on the shape of a kernel
    layout = candidates(dp=2, tp=4, micro_batches=16, sequence_parallel=True)
    whole, real = (call_time(machine, w, "actor_train", layout) for w in (full, tailed))
    assert real["linears"][0] / whole["linears"][0] == pytest.approx((1024 + 512) / 5120, rel=0.04)
    share = attended(tailed.prompts, tailed.responses) * (1024 + 512) / 5120**2
    assert real["attention"][0] / whole["attention"][0] == pytest.approx(share, rel=0.02)
    assert whole["imbalance"][0] == 0 < real["imbalance"][0] < 0.05 * real.total_s[0]


def test_packs_bounded_by_tokens_are_counted_as_the_runtime_makes_them() -> None:
    work = workload(batch_size=32, minibatches=1, prompt_tokens=16, response_tokens=512, mean_response_tokens=128)
    lengths = [16 + r for r in work.responses.draw(32, seed=1)]
    layout = candidates(dp=1, tp=8, micro_batch_tokens=1056)
    assert packed(work, "actor_train", layout).micro_batches[0] == len(packs(lengths, 1056))
    assert bound_tokens(work, "actor_train", layout)[0] == 1056
    full = workload(batch_size=32, minibatches=1, prompt_tokens=16, response_tokens=512)
    assert packed(full, "actor_train", layout).micro_batches[0] == 16  # two of 528 fit
    counted = candidates(dp=1, tp=8, micro_batches=16)
    machine = MEGATRON.on(H100, "bf16")
    both = [call_time(machine, full, "actor_train", c).total_s[0] for c in (layout, counted)]
    assert both[0] == pytest.approx(both[1], rel=1e-12)


def test_memory_of_packs_is_between_the_mean_and_all_at_the_longest() -> None:
    tailed = workload(response_tokens=4096, mean_response_tokens=512)
    for count in (2, 8, 64):
        layout = candidates(dp=2, tp=4, micro_batches=count)
        share = 64 / count
        bound = float(bound_tokens(tailed, "actor_train", layout)[0])
        assert max(share * 1536, 5120) <= bound <= share * 5120
    full = workload(response_tokens=4096)
    assert bound_tokens(full, "actor_train", candidates(dp=2, tp=4, micro_batches=8))[0] == 8 * 5120


def test_the_cache_of_slots_is_in_the_blocks_of_the_runtime() -> None:
    work = workload(batch_size=32, group_size=8, prompt_tokens=500, response_tokens=1000)
    machine = MEGATRON.on(H100, "bf16")
    memory = call_memory(machine, work, "actor_generate", candidates(dp=2, tp=4, slots=64))
    tokens = 256 * (cache_blocks(64, 500, 1000, 8) + 1)
    assert memory.terms()["kv_cache"][0] == tokens * 2 * LLAMA.layers * LLAMA.kv_heads / 4 * LLAMA.head_dim * 2


def test_a_prompt_is_computed_once_for_its_group() -> None:
    sizes = {"prompt_tokens": 2048, "response_tokens": 64}
    alone, grouped = workload(batch_size=64, **sizes), workload(batch_size=8, group_size=8, **sizes)
    layout = candidates(dp=1, tp=8)
    for engine, share in ((MEGATRON, 1 / 8), (NamedEngine("native"), 1.0)):
        machine = engine.on(H100, "bf16")
        one, many = (call_time(machine, w, "actor_generate", layout)["prefill"][0] for w in (grouped, alone))
        assert one / many == pytest.approx(share, rel=0.25)


def test_half_the_slots_take_less_than_twice_the_time_where_responses_have_a_tail() -> None:
    machine = MEGATRON.on(H100, "bf16")
    tailed = workload(response_tokens=1024, mean_response_tokens=200)
    all_at_once, half = (
        call_time(machine, tailed, "actor_generate", candidates(dp=1, tp=8, slots=slots)).total_s[0]
        for slots in (512, 256)
    )
    assert all_at_once < half < 1.5 * all_at_once
