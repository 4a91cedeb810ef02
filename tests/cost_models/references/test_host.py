"""The launch floor by hand: a layer takes the longer of its GPU time and of what the CPU needs to launch it, forward
and backward apart; a recomputed layer is launched once more. A gap between kernels stands for GPU time: one forward,
two backward."""

from __future__ import annotations

import pytest
from textbook import DENSE, TextbookKernels, layout, machine

from cost_models.time.inference import ForwardPass, inference_time
from cost_models.time.training import TrainingStep, training_time

VALUE = DENSE.with_value_head()
STEP, WORK = TrainingStep(VALUE, 32, 2048), ForwardPass(VALUE, 32, 2048, head_tokens=2048)
SLOTS = 24 * 4


def trained(recompute: str = "none", **constants: float) -> dict[str, float]:
    candidates = layout(dp=1, tp=8, micro_batches=4, recompute=recompute)
    terms = training_time(machine(TextbookKernels(), **constants), STEP, candidates)
    return {name: float(seconds[0]) for name, seconds in terms.items()}


@pytest.mark.parametrize(
    ("recompute", "forward", "backward", "gap", "waits"),
    [
        ("none", 3.0, 5.0, 0.0, 3 + 5),
        ("none", 3.0, 5.0, 1.0, (3 - 1) + (5 - 2)),
        ("none", 3.0, 5.0, 2.75, (3 - 2.75) + 0),
        ("none", 3.0, 5.0, 4.0, 0),
        ("selective", 3.0, 5.0, 1.0, (3 - 1) + (5 - 2)),
        ("full", 3.0, 5.0, 0.0, 3 + (5 + 3)),
        ("full", 3.0, 5.0, 1.0, (3 - 1) + (5 + 3 - 2 - 1)),
        ("full", 0.5, 5.0, 1.0, 0 + (5 + 0.5 - 2 - 1)),
    ],
)
def test_launch_floor_in_training(recompute: str, forward: float, backward: float, gap: float, waits: float) -> None:
    found = trained(recompute, host_forward_layer_s=forward, host_backward_layer_s=backward, layer_gap_s=gap)
    assert found["host"] == pytest.approx(SLOTS * waits)
    assert found["gaps"] == pytest.approx(SLOTS * 3 * gap)
    assert found["recompute"] == pytest.approx(SLOTS * gap if recompute == "full" else 0)


@pytest.mark.parametrize(("gap", "waits"), [(0.0, 3.0), (1.0, 2.0), (4.0, 0.0)])
def test_launch_floor_of_a_forward_pass(gap: float, waits: float) -> None:
    at = machine(TextbookKernels(), host_forward_layer_s=3.0, layer_gap_s=gap)
    terms = inference_time(at, WORK, layout(tp=8, micro_batches=4))
    assert terms["host"] == pytest.approx(SLOTS * waits)
    assert terms["gaps"] == pytest.approx(SLOTS * gap)


def test_schedule_and_bookkeeping() -> None:
    assert trained(step_s=7.0, micro_batch_s=0.5)["overhead"] == 7.0 + 4 * 0.5
    at = machine(TextbookKernels(), step_s=7.0, micro_batch_s=0.5)
    assert inference_time(at, WORK, layout(tp=8, micro_batches=4))["overhead"] == 4 * 0.5


def test_the_bubble_waits_for_launches_too() -> None:
    at = machine(TextbookKernels(), host_forward_layer_s=3.0, host_backward_layer_s=5.0)
    terms = training_time(at, STEP, layout(pp=4, micro_batches=4))
    assert terms["bubble"] == pytest.approx(3 * 6 * 8.0)
    assert inference_time(at, WORK, layout(pp=4, micro_batches=4))["bubble"] == pytest.approx(3 * 6 * 3.0)
