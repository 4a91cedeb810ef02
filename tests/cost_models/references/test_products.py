"""FLOPs of every product and passes over memory by hand: 2 m n k for C[m, n] = A[m, k] B[k, n], three products in
training (Narayanan et al. 2021, appendix); causal attention is half of 4 x tokens x length x width (Dao 2023)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from textbook import DENSE, compute, layout, memory, nanoseconds

from cost_models.time.inference import ForwardPass, inference_time
from cost_models.time.training import TrainingStep, training_time

# 32 samples of 2,048 tokens over dp 2 in 4 micro-batches: 4 sequences, 8,192 tokens; everything cut by tp 4.
STEP = TrainingStep(DENSE, 32, 2048)
WORK = ForwardPass(DENSE, 32, 2048, head_tokens=2048)
CUT = {"dp": 2, "tp": 4, "micro_batches": 4}
TOKENS, LAYERS, SLOTS = 8192, 24, 24 * 4
QKV, OUT, MLP = 1536 * (12 + 2 * 4) * 128, 12 * 128 * 1536, 3 * 1536 * 4096
PRODUCTS = 2 * TOKENS * (QKV + OUT + MLP) / 4
ATTENTION = 2 * TOKENS * 2048 * (12 * 128) / 4
HEAD = 2 * TOKENS * 1536 * 32_000 / 4


def test_products_of_a_layer() -> None:
    scored, trained = inference_time(compute(), WORK, layout(**CUT)), training_time(compute(), STEP, layout(**CUT))
    assert nanoseconds(scored["linears"]) == pytest.approx(SLOTS * PRODUCTS)
    assert nanoseconds(trained["linears"]) == pytest.approx(SLOTS * 3 * PRODUCTS)


def test_an_mlp_without_a_gate_has_two_matrices() -> None:
    plain = replace(WORK, spec=replace(DENSE, gated_mlp=False))
    products = 2 * TOKENS * (QKV + OUT + 2 * 1536 * 4096) / 4
    assert nanoseconds(inference_time(compute(), plain, layout(**CUT))["linears"]) == pytest.approx(SLOTS * products)


def test_more_tp_ranks_than_key_value_heads_repeat_them() -> None:
    narrow = replace(WORK, spec=replace(DENSE, kv_heads=2))
    width = (12 / 4 + 2) * 128
    products = 2 * TOKENS * (1536 * width + (OUT + MLP) / 4)
    assert nanoseconds(inference_time(compute(), narrow, layout(**CUT))["linears"]) == pytest.approx(SLOTS * products)


def test_attention_is_causal_and_its_backward_pass_two_and_a_half_times_the_forward() -> None:
    scored, trained = inference_time(compute(), WORK, layout(**CUT)), training_time(compute(), STEP, layout(**CUT))
    assert nanoseconds(scored["attention"]) == pytest.approx(SLOTS * ATTENTION)
    assert nanoseconds(trained["attention"]) == pytest.approx(SLOTS * 3.5 * ATTENTION)


def test_context_parallelism_cuts_queries_and_not_the_length_they_see() -> None:
    terms = inference_time(compute(), WORK, layout(dp=1, tp=4, cp=2, micro_batches=4))
    assert nanoseconds(terms["attention"]) == pytest.approx(SLOTS * ATTENTION)


def test_unfused_attention_does_the_masked_half_too_and_passes_over_the_scores() -> None:
    """At 1e12 FLOP/s 4 x tokens x length x width FLOPs; and tokens x length x heads scores of 2 bytes."""
    at = memory(flash_attention=False, softmax_passes=3.0)
    seconds = inference_time(at, WORK, layout(**CUT))["attention"]
    scores = TOKENS * 2048 * (12 / 4) * 2
    assert float(seconds[0]) == pytest.approx(SLOTS * (2 * ATTENTION / 1e12 + 3 * scores / 1e9))


def test_recomputation_repeats_the_layer_or_its_attention_core() -> None:
    full, selective = (
        training_time(compute(), STEP, layout(**CUT, recompute=mode))["recompute"] for mode in ("full", "selective")
    )
    assert nanoseconds(full) == pytest.approx(SLOTS * (PRODUCTS + ATTENTION))
    assert nanoseconds(selective) == pytest.approx(SLOTS * ATTENTION)


def test_head() -> None:
    scored, trained = inference_time(compute(), WORK, layout(**CUT)), training_time(compute(), STEP, layout(**CUT))
    assert nanoseconds(scored["head_and_loss"]) == pytest.approx(4 * HEAD)
    assert nanoseconds(trained["head_and_loss"]) == pytest.approx(4 * 3 * HEAD)
    prompts = inference_time(compute(), replace(WORK, head_tokens=1, scored=False), layout(**CUT))
    assert nanoseconds(prompts["head_and_loss"]) == pytest.approx(4 * HEAD / 2048), "one token of a sequence"


def test_a_value_head_reads_the_hidden_states() -> None:
    """Once forward, twice more backward; 2 bytes an element."""
    spec = DENSE.with_value_head()
    scored = inference_time(memory(), replace(WORK, spec=spec), layout(**CUT))
    trained = training_time(memory(), replace(STEP, spec=spec), layout(**CUT))
    assert nanoseconds(scored["head_and_loss"]) == pytest.approx(4 * TOKENS * 1536 * 2)
    assert nanoseconds(trained["head_and_loss"]) == pytest.approx(4 * 3 * TOKENS * 1536 * 2)


def test_loss_passes_over_fp32_logits() -> None:
    """Two passes each way make four: half of `loss_passes` forward."""
    at = memory(loss_passes=4.0, loss_backward_ratio=1.0)
    logits = TOKENS * 32_000 / 4 * 4
    scored, trained = inference_time(at, WORK, layout(**CUT)), training_time(at, STEP, layout(**CUT))
    assert nanoseconds(scored["head_and_loss"]) == pytest.approx(4 * 2 * logits)
    assert nanoseconds(trained["head_and_loss"]) == pytest.approx(4 * 4 * logits)
    fitted = inference_time(memory(loss_passes=2.6, loss_backward_ratio=1.0), WORK, layout(**CUT))
    assert nanoseconds(fitted["head_and_loss"]) == pytest.approx(4 * 1.3 * logits), "a fitted number need not be whole"
    slow = training_time(memory(loss_passes=4.0, loss_backward_ratio=2.0), STEP, layout(**CUT))
    assert nanoseconds(slow["head_and_loss"]) == pytest.approx(4 * 6 * logits)
    value = training_time(at, replace(STEP, spec=DENSE.with_value_head()), layout(**CUT))
    assert nanoseconds(value["head_and_loss"]) == pytest.approx(4 * 3 * TOKENS * 1536 * 2), "no loss over a vocabulary"


@pytest.mark.parametrize(("sequence_parallel", "share"), [(False, 1), (True, 4)])
def test_norms_and_residuals_pass_over_hidden_states_three_times_as_much_in_training(
    sequence_parallel: bool, share: int
) -> None:
    """Sequence parallelism cuts them over tp (Korthikanti et al. 2022, section 4.2.2)."""
    at, settings = memory(hidden_passes=5.0), CUT | {"sequence_parallel": sequence_parallel}
    hidden = TOKENS * 1536 * 2
    scored, trained = inference_time(at, WORK, layout(**settings)), training_time(at, STEP, layout(**settings))
    assert nanoseconds(scored["streaming"]) == pytest.approx(SLOTS * 5 * hidden / share)
    assert nanoseconds(trained["streaming"]) == pytest.approx(SLOTS * 3 * 5 * hidden / share)


@pytest.mark.parametrize(("gated", "width"), [(True, 1.5), (False, 1.0)])
def test_the_activation_function_passes_over_the_inner_width(gated: bool, width: float) -> None:
    terms = inference_time(memory(ffn_passes=2.0), replace(WORK, spec=replace(DENSE, gated_mlp=gated)), layout(**CUT))
    assert nanoseconds(terms["streaming"]) == pytest.approx(SLOTS * 2 * width * TOKENS * 4096 / 4 * 2)


def test_fp32_elements_are_four_bytes() -> None:
    terms = inference_time(memory(hidden_passes=1.0, dtype="fp32"), WORK, layout(**CUT))
    assert nanoseconds(terms["streaming"]) == pytest.approx(SLOTS * TOKENS * 1536 * 4)
