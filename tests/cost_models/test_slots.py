"""Slots that refill, packs and their imbalance, against event loops and enumeration."""

from __future__ import annotations

import random
from collections import deque
from itertools import product

import numpy as np
import pytest
from textbook import DENSE, EXPERTS, TextbookKernels
from textbook import machine as round_machine

from cost_models.candidates import Candidates
from cost_models.engines.constants import load_constants
from cost_models.engines.engine import MEGATRON, NamedEngine
from cost_models.memory.memory import call_memory
from cost_models.packing import attended, bound_tokens, packed, packing_of
from cost_models.slots import decode_moments
from cost_models.time.calls import call_time
from cost_models.time.generation import Generation, decode_terms
from plans.algorithms import ppo
from plans.batches import evenly, packs, sample_work
from plans.cluster import DeviceMesh
from plans.kvcache import BURST_ALONE, BURST_STEPS, cache_blocks
from plans.lengths import Lengths
from plans.library import load_cluster, load_model
from plans.model import ModelSpec
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


def played_together(queues: list[list[int]], slots: int, burst: int) -> tuple[int, int]:
    """Steps of replicas that wait for each other in every step, and rows of the one that has the most."""
    waiting, live = [deque(queue) for queue in queues], [list[int]() for _ in queues]
    steps = rows = 0
    while any(waiting) or any(live):
        for queue, held in zip(waiting, live, strict=True):
            held += [queue.popleft() for _ in range(min(len(queue), slots - len(held)))]
        count = min(burst, max(max(held, default=0) for held in live))
        steps, rows = steps + count, rows + count * max(map(len, live))
        live = [[left - count for left in held if left > count] for held in live]
    return steps, rows


@pytest.mark.parametrize(
    ("spec", "settings", "burst"),
    [
        (DENSE, {}, 2),
        (DENSE, {"tp": 4}, 2),
        (DENSE, {"pp": 2}, 8),
        (EXPERTS, {"tp": 2, "ep": 2}, 2),  # experts of one replica
        (EXPERTS, {"dp": 2, "ep": 2}, 8),
    ],
)
def test_a_replica_that_waits_for_nobody_looks_more_often(
    spec: ModelSpec, settings: dict[str, int], burst: int
) -> None:
    """48 responses of 15 tokens in the mean through eight slots of each replica: a layer takes a second a step, a row
    one of its own."""
    lengths, replicas = Lengths(60, 15), settings.get("dp", 1)
    games: dict[int, list[tuple[int, int]]] = {2: [], 8: []}
    for seed in range(60):
        rng = random.Random(seed)
        drawn = [[max(1, round(lengths.quantile(rng.random()))) for _ in range(48)] for _ in range(replicas)]
        for each, found in games.items():
            found.append(played_together(drawn, 8, each))
    means = {each: np.mean(found, axis=0) for each, found in games.items()}
    assert (means[8] > 1.08 * means[2]).all(), "too alike to tell one from the other"
    at = round_machine(TextbookKernels(), decode_layer_s=1.0, decode_row_s=1.0, burst_steps=8.0, burst_alone=2.0)
    work = Generation(spec, 48 * replicas, 64, lengths)
    # Beside a candidate whose bursts are the others'.
    among = [ParallelStrategy(slots=8, **one) for one in (settings, {"dp": replicas, "pp": 1 if burst == 8 else 2})]
    terms = decode_terms(
        at, work, Candidates.of([(DeviceMesh(first_node=0, nodes=1, first_gpu=0, gpus=one.size), one) for one in among])
    )
    steps, rows = terms["decode_kernels"][0] / spec.layers, terms["decode_head"][0]
    assert (steps, rows) == pytest.approx(tuple(means[burst]), rel=0.04)


def test_the_library_has_the_bursts_of_the_runtime() -> None:
    gpu, cpu = (load_constants("megatron", name, "fp32") for name in ("h100-80gb-sxm", "cpu"))
    assert (gpu.burst_steps, gpu.burst_alone) == (BURST_STEPS, 0)
    assert (cpu.burst_steps, cpu.burst_alone) == (BURST_STEPS, BURST_ALONE)


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
