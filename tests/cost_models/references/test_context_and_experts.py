"""By hand: context parallelism (Liu et al. 2023, Ring Attention), expert parallelism (Lepikhin et al. 2020, GShard)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from textbook import (
    DENSE,
    EXPERTS,
    FAR,
    NANO,
    TextbookKernels,
    compute,
    layout,
    machine,
    memory,
    nanoseconds,
    network,
)

from cost_models.time.inference import ForwardPass, inference_time
from cost_models.time.operations import layer_gemms
from cost_models.time.training import TrainingStep, training_time

STEP = TrainingStep(DENSE, 16, 2048)
LAYERS = 24
# 16 samples over dp 1 in 2 micro-batches, tokens cut over cp 4: 4,096 tokens a rank, keys and values of 4 / 2 heads.
RING = {"tp": 2, "cp": 4, "micro_batches": 2}
KEYS_AND_VALUES = 4096 * 2 * (4 // 2) * 128 * 2


def test_keys_and_values_go_around_the_ring_once_forward_and_twice_backward() -> None:
    """Every rank sends cp - 1 blocks of keys and as many of values; backward again, and their gradients with them."""
    trained = training_time(network(), STEP, layout(**RING))
    scored = inference_time(network(), ForwardPass(DENSE, 16, 2048, head_tokens=2048), layout(**RING))
    assert nanoseconds(trained["context_parallel"]) == pytest.approx(LAYERS * 2 * 3 * 3 * KEYS_AND_VALUES)
    assert nanoseconds(scored["context_parallel"]) == pytest.approx(LAYERS * 2 * 3 * KEYS_AND_VALUES)


def test_full_recomputation_goes_around_once_more() -> None:
    plain, full = (training_time(network(), STEP, layout(**RING, recompute=mode)) for mode in ("none", "full"))
    tensor_parallel = plain["tensor_parallel"] / 2
    assert nanoseconds(full["recompute"] - tensor_parallel) == pytest.approx(LAYERS * 2 * 3 * KEYS_AND_VALUES)


def test_a_key_value_head_is_not_cut_in_parts() -> None:
    narrow = replace(DENSE, kv_heads=1)
    terms = training_time(network(), replace(STEP, spec=narrow), layout(**RING))
    assert nanoseconds(terms["context_parallel"]) == pytest.approx(LAYERS * 2 * 3 * 3 * KEYS_AND_VALUES / 2)


def test_a_ring_over_two_nodes_goes_at_the_network_s_pace() -> None:
    terms = training_time(network(), STEP, layout(tp=4, cp=4, micro_batches=2))
    assert nanoseconds(terms["context_parallel"]) == pytest.approx(FAR * LAYERS * 2 * 3 * 3 * KEYS_AND_VALUES / 2)


def test_what_the_attention_of_the_other_blocks_takes_hides_the_ring() -> None:
    """Causal attention of a layer is 2 x tokens x length x heads x head_dim FLOPs, 3 / 4 of them on blocks received."""
    attention = 2 * 4096 * 2048 * (12 // 2) * 128
    ring = 3 * KEYS_AND_VALUES
    half_hidden = 0.5 * ring / (0.75 * attention)
    for flop, left in ((half_hidden, 0.5), (4 * half_hidden, 0.0)):
        at = machine(TextbookKernels(flop=flop * NANO, byte=NANO))
        terms = inference_time(at, ForwardPass(DENSE, 16, 2048, head_tokens=2048), layout(**RING))
        assert nanoseconds(terms["context_parallel"]) == pytest.approx(LAYERS * 2 * left * ring, abs=1.0)


def test_gathered_keys_are_gathered_forward_and_their_gradients_scattered_backward() -> None:
    """Every rank receives the blocks of the cp - 1 others before its attention, which hides nothing."""
    gathers = machine(TextbookKernels(byte=NANO), gathers_context=True)
    modes = ("none", "selective", "full")
    none, selective, full = (training_time(gathers, STEP, layout(**RING, recompute=mode)) for mode in modes)
    assert nanoseconds(none["context_parallel"]) == pytest.approx(LAYERS * 2 * 2 * 3 * KEYS_AND_VALUES)
    assert nanoseconds(selective["recompute"]) == pytest.approx(LAYERS * 2 * 3 * KEYS_AND_VALUES)
    tensor_parallel = none["tensor_parallel"] / 2
    assert nanoseconds(full["recompute"] - tensor_parallel) == pytest.approx(LAYERS * 2 * 3 * KEYS_AND_VALUES)


# 64 samples of 2,048 tokens over dp 8 in 4 micro-batches: 4,096 tokens a rank, each sent to 4 of 16 experts.
ROUTED = TrainingStep(EXPERTS, 64, 2048)
COPIES = 4096 * 4 * 1536 * 2


def test_tokens_go_to_their_experts_and_back_forward_and_backward() -> None:
    """Of k copies of every token (ep - 1) / ep leave the rank; two all-to-alls forward, two backward."""
    trained = training_time(network(), ROUTED, layout(dp=8, ep=8, micro_batches=4))
    scored = inference_time(
        network(), ForwardPass(EXPERTS, 64, 2048, head_tokens=2048), layout(dp=8, ep=8, micro_batches=4)
    )
    assert nanoseconds(trained["expert_parallel"]) == pytest.approx(LAYERS * 4 * 4 * 7 / 8 * COPIES)
    assert nanoseconds(scored["expert_parallel"]) == pytest.approx(LAYERS * 4 * 2 * 7 / 8 * COPIES)
    again = training_time(network(), ROUTED, layout(dp=8, ep=8, micro_batches=4, recompute="full"))
    assert nanoseconds(again["recompute"]) == pytest.approx(LAYERS * 4 * 2 * 7 / 8 * COPIES)


def test_tp_ranks_send_a_part_of_the_tokens_each() -> None:
    terms = training_time(network(), ROUTED, layout(dp=4, tp=2, ep=4, micro_batches=8))
    assert nanoseconds(terms["expert_parallel"]) == pytest.approx(LAYERS * 8 * 4 * 3 / 4 * COPIES / 2)


def test_experts_over_two_nodes_are_reached_over_the_network() -> None:
    terms = training_time(network(), ROUTED, layout(dp=16, ep=16, micro_batches=2))
    assert nanoseconds(terms["expert_parallel"]) == pytest.approx(FAR * LAYERS * 2 * 4 * 15 / 16 * COPIES)


def test_dense_models_and_experts_that_are_all_here_send_nothing() -> None:
    assert training_time(network(), STEP, layout(dp=8))["expert_parallel"] == 0
    assert training_time(network(), ROUTED, layout(dp=8))["expert_parallel"] == 0


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (1, 8), (2, 4), (4, 4)])
def test_experts_keep_their_width_under_tp_and_share_the_tokens(tp: int, ep: int) -> None:
    """A run of ep ranks holds every expert once, 16 / ep each, and brings the tokens of ep / tp replicas together."""
    tokens, degrees = np.array([4096.0]), (np.array([float(tp)]), np.array([float(ep)]))
    first, second = layer_gemms(EXPERTS, tokens, *degrees)[2:]
    rows = 4096 * ep / tp * 4 / 16
    assert [float(x) for x in (first.m[0], first.n[0], first.k, first.count[0])] == [rows, 2 * 640, 1536, 16 / ep]
    assert [float(x) for x in (second.m[0], second.n, second.k[0], second.count[0])] == [rows, 1536, 640, 16 / ep]


def test_a_shared_expert_is_one_more_mlp_that_tp_cuts() -> None:
    shared = replace(EXPERTS, shared_ffn=1024)
    gemms = layer_gemms(shared, np.array([4096.0]), np.array([4.0]), np.array([4.0]))
    assert [(float(g.m[0]), float(np.max(g.n)), float(np.max(g.k))) for g in gemms[4:]] == [
        (4096, 2 * 256, 1536),
        (4096, 1536, 256),
    ]
    at = memory(ffn_passes=1.0)
    for spec, width in ((EXPERTS, 4 * 640), (shared, 4 * 640 + 1024)):
        terms = inference_time(at, ForwardPass(spec, 64, 2048, head_tokens=2048), layout(dp=2, tp=4, micro_batches=4))
        assert nanoseconds(terms["streaming"]) == pytest.approx(LAYERS * 4 * 16384 * 1.5 * width / 4 * 2)


def test_a_token_alone_wakes_only_its_own_experts() -> None:
    """Expected number of distinct experts among n tokens that choose 4 of 16 each: 16 (1 - (3 / 4)^n)."""
    for tokens in (1, 2, 8):
        first, _ = layer_gemms(EXPERTS, np.array([float(tokens)]), np.ones(1), np.ones(1))[2:]
        awake = 16 * (1 - 0.75**tokens)
        assert float(first.count[0]) == pytest.approx(awake)
        assert float(first.m[0] * first.count[0]) == pytest.approx(4 * tokens)


@pytest.mark.parametrize(("tp", "ep"), [(1, 8), (2, 4), (4, 4)])
def test_every_token_passes_through_its_experts_and_no_others(tp: int, ep: int) -> None:
    """Balanced, a rank does the FLOPs of k experts for its share of the tokens; three times that in training."""
    tokens = 64 * 2048 * tp / (8 * 4)
    attention = 2 * tokens * (1536 * 20 * 128 + 12 * 128 * 1536) / tp
    products = attention + 2 * tokens / tp * 4 * 3 * 1536 * 640
    candidates = layout(dp=8 // tp, tp=tp, ep=ep, micro_batches=4)
    trained = training_time(compute(), ROUTED, candidates)
    scored = inference_time(compute(), ForwardPass(EXPERTS, 64, 2048, head_tokens=2048), candidates)
    assert nanoseconds(scored["linears"]) == pytest.approx(LAYERS * 4 * products)
    assert nanoseconds(trained["linears"]) == pytest.approx(LAYERS * 4 * 3 * products)


def test_tokens_that_tp_does_not_divide() -> None:
    """Three tokens of one sample over tp 2: each rank sends one and a half to their four experts, and back."""
    work = ForwardPass(EXPERTS, 1, 3, head_tokens=3)
    terms = inference_time(network(), work, layout(tp=2, ep=2))
    message = 3 / 2 * 4 * 1536 * 2
    assert nanoseconds(terms["expert_parallel"]) == pytest.approx(LAYERS * 2 * 1 / 2 * message)
