"""Decoding by hand: Pope et al. 2022, sections 2 and 3: every step reads the weights of a rank once and the keys and
values of its sequences; Megatron's two all-reduces stay, of one token per sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from textbook import (
    DENSE,
    EXPERTS,
    FAR,
    NANO,
    NOTHING,
    TextbookKernels,
    compute,
    layout,
    machine,
    memory,
    nanoseconds,
    network,
)

from cost_models.candidates import Array
from cost_models.engines.machine import machine_of
from cost_models.time.generation import Generation, decode_step, generation_time
from plans.cluster import ClusterSpec, GpuSpec
from plans.lengths import Lengths

LAYERS = 24
BLOCK = 1536 * (12 + 2 * 4) * 128 + 12 * 128 * 1536 + 3 * 1536 * 4096
# 64 prompts of 512 tokens, every response 1,024 tokens; dp 2 has 32 rows. Prefill makes the first token.
WORK = Generation(DENSE, 64, 512, Lengths(1024))
STEPS = 1023


def test_a_step_reads_keys_and_values_of_every_sequence() -> None:
    """2 x kv_heads / tp x head_dim x 2 bytes per token and layer; a head is not cut in parts."""
    for tp, heads in ((1, 4), (2, 2), (4, 1), (8, 1)):
        step = decode_step(memory(), DENSE, layout(dp=1, tp=tp), 32, 700)
        assert nanoseconds(step["decode_attention"]) == pytest.approx(LAYERS * 32 * 700 * 2 * heads * 128 * 2)
    step = decode_step(memory(), DENSE, layout(dp=8), 32, 700)
    assert nanoseconds(step["decode_attention"]) == pytest.approx(LAYERS * 4 * 700 * 2 * 4 * 128 * 2)


def test_the_cache_grows_by_a_token_a_step() -> None:
    """Step j of 1,023 reads 512 + j tokens, 1,024 on the average (less than a token off by the quadrature)."""
    terms = generation_time(memory(), WORK, layout(dp=2, tp=4))
    expected = STEPS * LAYERS * 32 * (512 + 512) * 2 * 1 * 128 * 2
    assert nanoseconds(terms["decode_attention"]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("tp", [1, 4])
def test_a_step_reads_the_weights_of_a_rank_once(tp: int) -> None:
    """With the product's own kernels where FLOPs are free: matrices, their inputs and outputs; the head's."""
    gpu = GpuSpec(name="round", memory_gib=80, bf16_tflops=1e6, fp32_tflops=1e6, hbm_gbps=1, link_gbps=1e6, pcie_gbps=1)
    cluster = ClusterSpec(nodes=1, gpus_per_node=8, gpu=gpu, inter_node_gbps=1)
    at = machine_of(cluster, replace(NOTHING, gemm_efficiency=1e6))
    step = decode_step(at, DENSE, layout(dp=1, tp=tp), 2, 700)
    passing = (1536 + 20 * 128 / tp) + (12 * 128 / tp + 1536) + (1536 + 2 * 4096 / tp) + (4096 / tp + 1536)
    assert nanoseconds(step["decode_linears"]) == pytest.approx(LAYERS * 2 * (BLOCK / tp + 2 * passing))
    head = 2 * (32_000 * 1536 / tp + 2 * (1536 + 32_000 / tp))
    assert nanoseconds(step["decode_head"]) == pytest.approx(head, rel=1e-3)


def test_a_step_does_two_flops_per_weight_and_sequence() -> None:
    step = decode_step(compute(), DENSE, layout(dp=2, tp=4), 64, 700)
    assert nanoseconds(step["decode_linears"]) == pytest.approx(LAYERS * 2 * 32 * BLOCK / 4)
    assert nanoseconds(step["decode_head"]) == pytest.approx(2 * 32 * 1536 * 32_000 / 4)


def test_hidden_states_of_one_token_are_summed_twice_a_layer() -> None:
    message = 32 * 1536 * 2
    step = decode_step(network(), DENSE, layout(dp=2, tp=4), 64, 700)
    assert nanoseconds(step["decode_tensor_parallel"]) == pytest.approx(LAYERS * 2 * 2 * 3 / 4 * message)
    far = decode_step(network(), DENSE, layout(tp=16), 32, 700)
    assert nanoseconds(far["decode_tensor_parallel"]) == pytest.approx(FAR * LAYERS * 2 * 2 * 15 / 16 * message)


def test_the_token_is_chosen_from_the_best_of_every_part_of_the_vocabulary() -> None:
    """32 bytes per sequence and tp rank are gathered; a rank that is the whole pipeline sums the embedding too."""
    step = decode_step(network(), DENSE, layout(dp=2, tp=4), 64, 700)
    assert nanoseconds(step["decode_head"]) == pytest.approx(3 / 4 * 32 * 32 * 4 + 2 * 3 / 4 * 32 * 1536 * 2)
    piped = decode_step(network(), DENSE, layout(tp=4, pp=2, groups=2), 64, 700)
    slots = 2 * 3 / 4 * 32 * 32 * 4
    assert nanoseconds(piped["decode_head"]) == pytest.approx(slots)
    passes = decode_step(memory(sampling_bytes=6.0), DENSE, layout(dp=2, tp=4), 64, 700)
    assert nanoseconds(passes["decode_head"]) == pytest.approx(32 * 32_000 / 4 * 6)


def test_experts_of_other_replicas_need_their_tokens_gathered_and_sums_scattered() -> None:
    """ep / tp replicas of 8 rows each; experts that tp ranks hold need nothing but the sum over tp."""
    message = 8 * 1536 * 2
    apart = decode_step(network(), EXPERTS, layout(dp=4, tp=2, ep=8), 32, 700)
    within = decode_step(network(), EXPERTS, layout(dp=4, tp=2, ep=2), 32, 700)
    sums = LAYERS * 2 * 2 * 1 / 2 * message
    assert nanoseconds(within["decode_tensor_parallel"]) == pytest.approx(sums)
    assert nanoseconds(apart["decode_tensor_parallel"]) == pytest.approx(sums + LAYERS * 2 * 3 / 4 * 4 * message)
    pair = decode_step(network(), EXPERTS, layout(dp=4, tp=2, ep=4), 32, 700)
    assert nanoseconds(pair["decode_tensor_parallel"]) == pytest.approx(sums + LAYERS * 2 * 1 / 2 * 2 * message)
    far = decode_step(network(), EXPERTS, layout(dp=16, ep=16), 128, 700)
    assert nanoseconds(far["decode_tensor_parallel"]) == pytest.approx(FAR * LAYERS * 2 * 15 / 16 * 16 * message)


def test_replicas_are_joined_where_a_run_ends_inside_one() -> None:
    """ep 3 on replicas of tp 2: three replicas are two whole runs, so that 8 rows of each are gathered."""
    spec, message = replace(EXPERTS, experts=12), 8 * 1536 * 2
    step = decode_step(network(), spec, layout(dp=12, tp=2, ep=3), 96, 700)
    sums = LAYERS * 2 * 2 * 1 / 2 * message
    assert nanoseconds(step["decode_tensor_parallel"]) == pytest.approx(sums + LAYERS * 2 * 2 / 3 * 3 * message)


def test_prompts_of_joined_replicas_pass_in_parts_that_are_gathered() -> None:
    """Each of two replicas has 32 prompts of 512 tokens: in passes of 2,048 tokens together, 16 instead of 8. Their
    experts get 2 x 16,384 tokens of 1,536 bf16 numbers, and give as many back; no token is sent to an expert alone."""
    work = replace(WORK, spec=EXPERTS)
    constants = {"prefill_tokens": 2048.0, "burst_steps": 64.0}
    for ep, passes, moved in ((1, 8, 0), (2, 16, 2 * LAYERS * 1 / 2 * 2 * 16_384 * 1536 * 2)):
        terms = generation_time(network(**constants), work, layout(dp=2, ep=ep))
        assert nanoseconds(terms["prefill"]) == pytest.approx(moved), ep
        at = machine(TextbookKernels(), micro_batch_s=1.0, **constants)
        assert generation_time(at, work, layout(dp=2, ep=ep))["prefill"] == pytest.approx(passes), ep


def test_joined_replicas_compute_the_rows_of_the_fullest() -> None:
    """Rows against draws: 8 replicas of 32 slots, where a row takes a second. In the tail the fullest replica has
    several more than the mean; the last step of a replica alone has one."""
    at = machine(TextbookKernels(), decode_row_s=1.0, burst_steps=1.0)
    work = Generation(EXPERTS, 256, 512, Lengths(1024, 256))
    apart, joined = (float(generation_time(at, work, layout(dp=8, ep=ep))["decode_head"][0]) for ep in (1, 8))
    shares = np.random.default_rng(0).random((50, 8, 32))
    drawn = np.vectorize(work.responses.quantile)(shares)
    alive = (drawn[..., None] > np.arange(0, 1024, 8)).sum(2)
    runs = alive.any(1)
    most, mean = (8 * (np.maximum(rows, 1) * runs).mean(0).sum() for rows in (alive.max(1), alive.mean(1)))
    assert apart == pytest.approx(mean, rel=0.1)
    assert joined == pytest.approx(most, rel=0.1) and most > 1.1 * mean


@pytest.mark.parametrize(("groups", "rounds"), [(1, 4), (2, 4), (4, 4), (8, 8)])
def test_a_pipeline_decodes_at_the_pace_of_its_groups_or_of_one_trip(groups: int, rounds: int) -> None:
    """max(groups, stages) turns of a stage of 6 layers; hidden states of a group go to the next stage every turn."""
    step = decode_step(network(), DENSE, layout(tp=2, pp=4, groups=groups), 64, 700)
    rows = 64 / groups
    assert nanoseconds(step["decode_p2p"]) == pytest.approx(rounds * rows * 1536 * 2)
    alone = decode_step(network(), DENSE, layout(tp=2, groups=groups), 64, 700)
    assert not alone["decode_p2p"].any(), "one stage sends nothing"
    sums = rounds * 6 * 2 * 2 * 1 / 2 * rows * 1536 * 2
    assert nanoseconds(step["decode_tensor_parallel"]) == pytest.approx(sums)


def test_a_step_waits_for_the_slowest_stage_or_for_its_own_trip() -> None:
    """22 layers over 4 stages are 5 + 6 + 6 + 5. A layer takes 1 s, the head 3 s: the last stage has 8 s against 6 s.
    Four groups wait for it four times; one group takes 5 + 6 + 6 + 8 s."""
    uneven = replace(DENSE, layers=22)
    at = machine(TextbookKernels(), decode_layer_s=1.0, decode_step_s=3.0)
    for groups, seconds in ((4, 4 * 8), (8, 8 * 8), (1, 25), (2, 25)):
        step = decode_step(at, uneven, layout(tp=2, pp=4, groups=groups), 8 * groups, 700)
        assert sum(float(s[0]) for s in step.values()) == pytest.approx(seconds), groups
    short = machine(TextbookKernels(), decode_layer_s=1.0, decode_step_s=0.5)
    for groups, seconds in ((4, 4 * 6), (1, 5 + 6 + 6 + 5.5)):
        step = decode_step(short, uneven, layout(tp=2, pp=4, groups=groups), 8 * groups, 700)
        assert sum(float(s[0]) for s in step.values()) == pytest.approx(seconds), groups


def test_launches_bookkeeping_and_rows() -> None:
    """A layer that runs 1 s and takes 3 s to launch waits 2 s; a step has 5 s of bookkeeping and 0.25 s a row."""
    at = machine(TextbookKernels(), host_decode_layer_s=3.0, decode_layer_s=1.0, decode_step_s=5.0, decode_row_s=0.25)
    step = decode_step(at, DENSE, layout(dp=2, tp=4), 64, 700)
    assert step["decode_kernels"] == pytest.approx(LAYERS * 1.0)
    assert step["decode_host"] == pytest.approx(LAYERS * 2.0)
    assert step["decode_head"] == pytest.approx(5.0 + 32 * 0.25, rel=1e-3)
    uneven = decode_step(at, replace(DENSE, layers=22), layout(tp=2, pp=4, groups=4), 32, 700)
    assert sum(float(s[0]) for s in uneven.values()) == pytest.approx(4 * max(6 * 3, 5 * 3 + 7.0), rel=1e-3)


@pytest.mark.parametrize("part", [{"waves": 4}, {"slots": 8}])
def test_parts_of_the_samples_decode_one_after_the_other(part: dict[str, int]) -> None:
    """A quarter of 32 rows at a time: as many bytes in all, four times as many steps."""
    whole, parts = (generation_time(network(), WORK, layout(dp=2, tp=4, **settings)) for settings in ({}, part))
    assert nanoseconds(whole["decode_tensor_parallel"]) == pytest.approx(STEPS * LAYERS * 4 * 3 / 4 * 32 * 1536 * 2)
    assert parts["decode_tensor_parallel"] == pytest.approx(whole["decode_tensor_parallel"])
    host = machine(TextbookKernels(), decode_layer_s=1.0)
    assert generation_time(host, WORK, layout(dp=2, tp=4, waves=4))["decode_kernels"] == pytest.approx(
        4 * STEPS * LAYERS
    )


@pytest.mark.parametrize(
    ("settings", "passes"),
    [({}, 1), ({"waves": 4}, 4), ({"slots": 8}, 4), ({"groups": 2, "waves": 2}, 4), ({"micro_batches": 8}, 8)],
)
def test_prompts_pass_forward_once_in_groups(settings: dict[str, int], passes: int) -> None:
    """All prompts in `passes` passes; of each sequence one token reaches the head, and nothing is scored."""
    at = compute(micro_batch_s=1.0)
    seconds = float(generation_time(at, WORK, layout(dp=2, tp=4, **settings))["prefill"][0])
    tokens = 32 * 512
    layer = 2 * tokens * BLOCK / 4 + 2 * tokens * 512 * 12 * 128 / 4
    head = 2 * 32 * 1536 * 32_000 / 4
    assert seconds == pytest.approx(passes * 1.0 + (LAYERS * layer + head) * 1e-9)


@pytest.mark.parametrize(
    ("responses", "burst", "passes"),
    [
        (Lengths(1024, 256), 64, 2 + 32),  # 8 waves of 256 steps in bursts of 64: some newcomers in each
        (Lengths(1024, 256), 16, 2 + 56),  # more bursts than newcomers: one pass for each
        (Lengths(1024, 256), 5000, 2 + 1),  # they come together
        (Lengths(1024), 64, 2 + 2 * 7),  # all end at once: seven more waves of two passes
    ],
)
def test_newcomers_join_between_bursts(responses: Lengths, burst: float, passes: int) -> None:
    """64 prompts of 512 tokens, eight in flight: two passes of 2,048 tokens begin, 56 prompts come later."""
    constants = {"prefill_tokens": 2048.0, "burst_steps": float(burst), "micro_batch_s": 1.0}
    work = replace(WORK, responses=responses)
    terms = generation_time(machine(TextbookKernels(), **constants), work, layout(dp=1, slots=8))
    assert terms["prefill"] == pytest.approx(passes)
    flops = generation_time(compute(**constants), work, layout(dp=1, slots=8))["prefill"] - passes
    layer = 2 * 64 * 512 * BLOCK + 2 * 64 * 512 * 512 * 12 * 128
    assert nanoseconds(flops) == pytest.approx(LAYERS * layer + 2 * 64 * 1536 * 32_000, rel=1e-6)


@pytest.mark.parametrize(
    ("samples", "tokens", "passes"),
    [
        (12, 4096.0, 1 + 1),  # half a wave more is one pass, not none
        (12, 1024.0, 4 + 2),  # two prompts a pass
        (28, 1024.0, 4 + 2 * 4 + 2),
        (13, 1024.0, 4 + 3),
    ],
)
def test_further_waves_of_equal_responses_take_the_passes_of_their_prompts(
    samples: int, tokens: float, passes: int
) -> None:
    """Prompts of 512 tokens, eight in flight."""
    at = machine(TextbookKernels(), prefill_tokens=tokens, burst_steps=64.0, micro_batch_s=1.0)
    work = replace(WORK, samples=samples)
    assert generation_time(at, work, layout(dp=1, slots=8))["prefill"] == pytest.approx(passes)


class WeightReads(TextbookKernels):
    """A product takes as long as its weights are many, whatever it multiplies them with."""

    def gemm(self, m: Array, n: Array | float, k: Array | float) -> Array:
        return np.ones_like(m) * n * k * self.flop

    def attention(self, head_dim: int, tokens: Array, length: Array, heads: Array) -> Array:
        return np.zeros_like(tokens)


@pytest.mark.parametrize(
    ("changes", "tokens", "settings", "own", "passes"),
    [
        ({"samples": 8}, 8192.0, {}, 0, 1),
        ({"samples": 16}, 8192.0, {}, 0, 2),
        ({"samples": 16}, 2048.0, {}, 2, 4),  # of two passes before a burst the last is a part of it
        ({"samples": 16}, 2048.0, {"groups": 2}, 1, 4),  # and so for each group of those that begin
        ({"samples": 64, "responses": Lengths(1024, 256)}, 2048.0, {}, 1, 2 + 56),
        ({"samples": 8, "group_size": 4}, 8192.0, {}, 1, 1),  # three of four wait for the keys of the first
        ({"samples": 16}, 2048.0, {"burst": 0.0}, 4, 4),
        ({"samples": 16, "spec": EXPERTS}, 2048.0, {"dp": 2, "ep": 2}, None, None),
        ({"samples": 16}, 2048.0, {"pp": 2}, None, None),
    ],
)
def test_prompts_that_join_a_step_read_no_weights_of_their_own(
    changes: dict[str, Any], tokens: float, settings: dict[str, Any], own: int | None, passes: int | None
) -> None:
    """Prompts of 512 tokens, eight in flight. Every pass has a head; one of its own has a schedule too."""
    degrees = {name: value for name, value in settings.items() if name != "burst"}
    constants = {"prefill_tokens": tokens, "burst_steps": 16.0, "micro_batch_s": 1.0, "shares_prompts": True}
    work, candidates = replace(WORK, **changes), layout(slots=8, **degrees)

    def seconds(kernels: TextbookKernels, alone: float) -> float:
        return float(generation_time(machine(kernels, burst_alone=alone, **constants), work, candidates)["prefill"][0])

    joined = seconds(WeightReads(flop=NANO), settings.get("burst", 2.0))
    if own is None or passes is None:
        assert joined == seconds(WeightReads(flop=NANO), 0.0), "replicas that wait for others compute prompts apart"
        return
    assert joined == pytest.approx(own * (1.0 + LAYERS * BLOCK * NANO) + passes * 1536 * 32_000 * NANO)
    apart = seconds(TextbookKernels(flop=NANO), 0.0) - seconds(TextbookKernels(flop=NANO), 2.0)
    assert apart == pytest.approx(passes - own if "burst" not in settings else 4 - 2), "as many FLOPs in both"


def test_newcomers_of_several_replicas() -> None:
    """As many samples on each of two replicas take the same passes, and a lone row is not two."""
    at = machine(TextbookKernels(), prefill_tokens=2048.0, burst_steps=64.0, micro_batch_s=1.0)
    work = replace(WORK, samples=128, responses=Lengths(1024, 256))
    assert generation_time(at, work, layout(dp=2, slots=8))["prefill"] == pytest.approx(2 + 32)
    flops = generation_time(compute(prefill_tokens=2048.0, burst_steps=64.0), work, layout(dp=2, slots=8))["prefill"]
    layer = 2 * 64 * 512 * BLOCK + 2 * 64 * 512 * 512 * 12 * 128
    assert nanoseconds(flops) == pytest.approx(LAYERS * layer + 2 * 64 * 1536 * 32_000, rel=1e-6)
    step = decode_step(network(), DENSE, layout(tp=4), 1, 700)
    assert nanoseconds(step["decode_tensor_parallel"]) == pytest.approx(LAYERS * 2 * 2 * 3 / 4 * 1536 * 2)


@pytest.mark.parametrize(("burst", "steps"), [(0.0, 1023), (64.0, 1024)])
def test_an_engine_that_refills_makes_the_first_token_too(burst: float, steps: int) -> None:
    at = machine(TextbookKernels(), decode_layer_s=1.0, burst_steps=burst)
    terms = generation_time(at, WORK, layout(dp=8))
    assert terms["decode_kernels"] == pytest.approx(LAYERS * steps)


def test_a_response_of_one_token_needs_no_step() -> None:
    terms = generation_time(network(), replace(WORK, responses=Lengths(1)), layout(dp=2, tp=4))
    assert np.all(terms["decode_tensor_parallel"] == 0)


def test_a_lone_sample_takes_its_own_length_and_many_take_the_longest() -> None:
    """A step runs while any sample is unfinished: 256 steps for one of that mean, nearly all 1,023 for ten thousand."""
    at = machine(TextbookKernels(), decode_layer_s=1.0)
    for samples, steps, error in ((1, 256, 0.02), (10_000, STEPS, 0.05)):
        work = Generation(DENSE, samples, 512, Lengths(1024, 256))
        terms = generation_time(at, work, layout(tp=8))
        assert terms["decode_kernels"] == pytest.approx(LAYERS * steps, rel=error)
