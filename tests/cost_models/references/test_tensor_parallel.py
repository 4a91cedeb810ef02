"""Tensor parallelism by hand: Shoeybi et al. 2019 (Megatron-LM), figures 3 and 4 and section 3; Korthikanti et al.
2022, section 4.2. A ring all-reduce of M bytes over t ranks sends 2 (t - 1) / t M from each."""

from __future__ import annotations

from dataclasses import replace

import pytest
from textbook import DENSE, FAR, layout, nanoseconds, network

from cost_models.time.inference import ForwardPass, inference_time
from cost_models.time.training import TrainingStep, training_time

# 64 samples of 2,048 tokens over dp 2 in 4 micro-batches: 8 sequences, [16384, 1536] in two bytes.
STEP = TrainingStep(DENSE, 64, 2048)
HIDDEN = 8 * 2048 * 1536 * 2
ALL_REDUCE = 2 * 3 / 4
"""Of the message, over 4 ranks."""
LAYERS, MICRO_BATCHES = 24, 4


def cut(**more: object) -> dict[str, object]:
    return {"dp": 2, "tp": 4, "micro_batches": 4} | more


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_layer_sums_hidden_states_twice_forward_and_twice_backward(sequence_parallel: bool) -> None:
    """Sequence parallelism puts a reduce-scatter and an all-gather, 2 x (t - 1) / t, in place of each all-reduce."""
    terms = training_time(network(), STEP, layout(**cut(sequence_parallel=sequence_parallel)))
    assert nanoseconds(terms["tensor_parallel"]) == pytest.approx(LAYERS * MICRO_BATCHES * 4 * ALL_REDUCE * HIDDEN)
    assert terms["recompute"] == 0


def test_a_forward_pass_sums_twice() -> None:
    work = ForwardPass(DENSE, 64, 2048, head_tokens=2048)
    terms = inference_time(network(), work, layout(**cut()))
    assert nanoseconds(terms["tensor_parallel"]) == pytest.approx(LAYERS * MICRO_BATCHES * 2 * ALL_REDUCE * HIDDEN)


def test_full_recomputation_sums_twice_again_and_selective_does_not() -> None:
    full, selective = (training_time(network(), STEP, layout(**cut(recompute=mode))) for mode in ("full", "selective"))
    assert nanoseconds(full["recompute"]) == pytest.approx(LAYERS * MICRO_BATCHES * 2 * ALL_REDUCE * HIDDEN)
    assert selective["recompute"] == 0


def test_the_part_that_hides_behind_products_is_not_waited_for() -> None:
    terms = training_time(network(tensor_overlap=0.25), STEP, layout(**cut()))
    assert nanoseconds(terms["tensor_parallel"]) == pytest.approx(0.75 * LAYERS * MICRO_BATCHES * 4 * 1.5 * HIDDEN)


def test_a_group_over_two_nodes_goes_at_the_network_s_pace() -> None:
    terms = training_time(network(), STEP, layout(tp=16, micro_batches=8))
    message = 8 * 2048 * 1536 * 2
    assert nanoseconds(terms["tensor_parallel"]) == pytest.approx(FAR * LAYERS * 8 * 4 * 2 * 15 / 16 * message)


def test_cp_and_micro_batches_share_the_tokens() -> None:
    terms = training_time(network(), STEP, layout(dp=1, tp=4, cp=2, micro_batches=16))
    assert nanoseconds(terms["tensor_parallel"]) == pytest.approx(LAYERS * 16 * 4 * ALL_REDUCE * 2 * 2048 * 1536 * 2)


def test_the_vocabulary_s_ends_reduce_logits_as_scalars_and_hidden_states_once_each() -> None:
    """Cross entropy reduces a maximum, then the label's logit, the sum of exponentials and (here) that of the entropy:
    16 bytes a token. The head sums the gradient of its input, the embedding its output."""
    terms = training_time(network(), STEP, layout(**cut()))
    scalars = 8 * 2048 * 16
    assert nanoseconds(terms["head_and_loss"]) == pytest.approx(MICRO_BATCHES * ALL_REDUCE * (scalars + 2 * HIDDEN))
    scored = inference_time(network(), ForwardPass(DENSE, 64, 2048, head_tokens=2048), layout(**cut()))
    assert nanoseconds(scored["head_and_loss"]) == pytest.approx(MICRO_BATCHES * ALL_REDUCE * (scalars + HIDDEN))
    prompts = ForwardPass(DENSE, 64, 2048, head_tokens=1, scored=False)
    unscored = inference_time(network(), prompts, layout(**cut()))
    assert nanoseconds(unscored["head_and_loss"]) == pytest.approx(MICRO_BATCHES * ALL_REDUCE * HIDDEN)


def test_in_a_pipeline_the_embedding_is_not_with_the_head() -> None:
    terms = training_time(network(), STEP, layout(dp=1, tp=4, pp=2, micro_batches=8))
    assert nanoseconds(terms["head_and_loss"]) == pytest.approx(8 * ALL_REDUCE * (8 * 2048 * 16 + HIDDEN))


def test_a_value_head_is_whole_on_every_rank_and_reduces_nothing() -> None:
    step = replace(STEP, spec=DENSE.with_value_head())
    terms = training_time(network(), step, layout(**cut()))
    assert nanoseconds(terms["head_and_loss"]) == pytest.approx(MICRO_BATCHES * ALL_REDUCE * HIDDEN), "the embedding"
    piped = training_time(network(), step, layout(dp=1, tp=4, pp=2, micro_batches=8))
    assert nanoseconds(piped["head_and_loss"]) < 1
