"""Pipelines by hand: Narayanan et al. 2021, section 2.2. 1F1B waits (p - 1) (t_f + t_b) besides its micro-batches, the
interleaved schedule a v-th of it, with v times the sends; an activation goes down and a gradient comes up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from textbook import DENSE, FAR, compute, layout, nanoseconds, network

from cost_models.time.inference import ForwardPass, inference_time
from cost_models.time.training import TrainingStep, training_time

VALUE = DENSE.with_value_head()
"""Its head is no product, so that every stage does the same."""
# 32 samples of 2,048 tokens over dp 1 in 8 micro-batches: 8,192 tokens each; between stages [8192, 1536] in 2 bytes.
STEP, WORK = TrainingStep(VALUE, 32, 2048), ForwardPass(VALUE, 32, 2048, head_tokens=2048)
TOKENS, HIDDEN = 8192, 8192 * 1536 * 2


def layer_flops(tokens: int = TOKENS) -> tuple[float, float]:
    """Forward FLOPs of a layer: products, attention."""
    products = 2 * tokens * (1536 * (12 + 2 * 4) * 128 + 12 * 128 * 1536 + 3 * 1536 * 4096)
    return products, 2 * tokens * 2048 * 12 * 128


def both_ways() -> float:
    """Forward and backward: three products, attention 1 + 2.5."""
    products, attention = layer_flops()
    return 3 * products + 3.5 * attention


@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (4, 1), (8, 1), (4, 2), (4, 3)])
def test_bubble(pp: int, vpp: int) -> None:
    terms = training_time(compute(), STEP, layout(pp=pp, vpp=vpp, micro_batches=8))
    stage = 24 / pp * both_ways()
    assert nanoseconds(terms["bubble"]) == pytest.approx((pp - 1) * stage / vpp)
    assert nanoseconds(terms.total_s) == pytest.approx(8 * stage + (pp - 1) * stage / vpp)


def test_a_forward_call_fills_the_pipeline_once() -> None:
    terms = inference_time(compute(), WORK, layout(pp=4, micro_batches=8))
    assert nanoseconds(terms.total_s) == pytest.approx((8 + 3) * 6 * sum(layer_flops()))


def test_recomputation_is_in_the_bubble_too() -> None:
    terms = training_time(compute(), STEP, layout(pp=4, micro_batches=8, recompute="full"))
    assert nanoseconds(terms["bubble"]) == pytest.approx(3 * 6 * (both_ways() + sum(layer_flops())))


def test_a_head_makes_the_last_stage_the_slowest() -> None:
    """Every micro-batch waits for it; the bubble is the time of the others."""
    terms = training_time(compute(), replace(STEP, spec=DENSE), layout(pp=4, micro_batches=8))
    assert nanoseconds(terms["head_and_loss"]) == pytest.approx(8 * 3 * 2 * TOKENS * 1536 * 32_000)
    assert nanoseconds(terms["bubble"]) == pytest.approx(3 * 6 * both_ways())


def test_uneven_stages_go_at_the_pace_of_the_full_ones() -> None:
    """22 layers over 4 stages are 5 + 6 + 6 + 5."""
    terms = training_time(compute(), replace(STEP, spec=replace(VALUE, layers=22)), layout(pp=4, micro_batches=8))
    assert nanoseconds(terms.total_s) == pytest.approx((8 * 6 + 5 + 6 + 5) * both_ways())


@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (4, 1), (4, 2), (8, 3)])
def test_an_activation_and_a_gradient_in_every_slot(pp: int, vpp: int) -> None:
    terms = training_time(network(), STEP, layout(pp=pp, vpp=vpp, micro_batches=8))
    assert nanoseconds(terms["pipeline_p2p"]) == pytest.approx(2 * vpp * (8 + (pp - 1) / vpp) * HIDDEN)


def test_a_forward_call_sends_in_one_direction() -> None:
    terms = inference_time(network(), WORK, layout(pp=4, micro_batches=8))
    assert nanoseconds(terms["pipeline_p2p"]) == pytest.approx((8 + 3) * HIDDEN)
    hidden = inference_time(network(pipeline_overlap=0.25), WORK, layout(pp=4, micro_batches=8))
    assert nanoseconds(hidden["pipeline_p2p"]) == pytest.approx(0.75 * (8 + 3) * HIDDEN)


def test_sequence_parallel_ranks_send_a_part_each() -> None:
    whole, parts = (layout(tp=2, pp=4, micro_batches=8, sequence_parallel=flag) for flag in (False, True))
    assert nanoseconds(training_time(network(), STEP, whole)["pipeline_p2p"]) == pytest.approx(2 * 11 * HIDDEN)
    assert nanoseconds(training_time(network(), STEP, parts)["pipeline_p2p"]) == pytest.approx(2 * 11 * HIDDEN / 2)


def test_scatter_and_gather_between_stages() -> None:
    """A t-th over the network and an all-gather of the parts inside the node (section 4.1)."""
    at = network(splits_sends=True)
    terms = training_time(at, STEP, layout(tp=8, pp=2, micro_batches=8))
    assert nanoseconds(terms["pipeline_p2p"]) == pytest.approx(2 * 9 * (FAR * HIDDEN / 8 + 7 / 8 * HIDDEN))
    terms = training_time(at, STEP, layout(tp=8, pp=2, micro_batches=8, sequence_parallel=True))
    assert nanoseconds(terms["pipeline_p2p"]) == pytest.approx(2 * 9 * FAR * HIDDEN / 8)


def test_stages_on_several_nodes_send_over_the_network() -> None:
    terms = training_time(network(pipeline_overlap=0.5), STEP, layout(tp=8, pp=2, micro_batches=8))
    assert nanoseconds(terms["pipeline_p2p"]) == pytest.approx(0.5 * FAR * 2 * 9 * HIDDEN)


def test_without_a_pipeline_nothing_is_sent_and_nothing_waits() -> None:
    for terms in (training_time(network(), STEP, layout(dp=8)), inference_time(network(), WORK, layout(dp=8))):
        assert terms["pipeline_p2p"] == terms["bubble"] == 0
