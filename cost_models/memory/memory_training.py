"""Memory of a training step on its fullest rank: state, activations in flight, loss, temporaries.

Three moments compete on a stage: the backward pass of a block while every micro-batch in flight is stored, the loss on
the last stage, and the gradient of the embedding when a micro-batch is done. The fullest stage and moment are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from cost_models.candidates import FULL_RECOMPUTE, Array
from cost_models.engines.habits import MemoryHabits
from cost_models.memory.activations import (
    BlockWidths,
    backward_block_bytes,
    block_widths,
    kept_block_bytes,
    stored_block_bytes,
)
from cost_models.memory.memory_terms import MemoryTerms
from cost_models.memory.training_case import StageParts, TrainingCase, stage_parts
from plans.cluster import GIB
from plans.model import ModelSpec

FP32_BYTES = 4.0
ADAM_BYTES = 8.0
HEAD_TEMPORARIES = 8.0
"""Bytes of the two fp32 temporaries of log-probs, per entry of the logits that they are made for at a time."""


@dataclass(frozen=True, eq=False)
class StateBytes:
    """Weights, gradients, masters and Adam moments of a rank, bytes; `base`: frozen weights beside adapters."""

    weights: Array
    base: Array
    gradients: Array
    masters: Array
    optimizer: Array


def state_bytes(stage: StageParts, case: TrainingCase) -> StateBytes:
    """Model state of a rank: Megatron's 6 + 12/d bytes per bf16 parameter (`report_theoretical_memory`).

    Weights in the run's precision, fp32 gradients, fp32 masters (none when the run is fp32), two fp32 moments. zero 1
    shards masters and moments over dp x cp, those of experts over dp x cp x tp / ep; zero 3 shards everything, with the
    fp32 masters as the only weights. With LoRA all this is of the adapters; the base has weights alone.
    """
    dense = stage.sharded / case.tp + stage.replicated
    experts = stage.experts / case.ep
    base = np.zeros_like(dense)
    if stage.frozen:
        base = dense * case.element / np.where(case.zero >= 3, case.replicas, 1.0)
        dense = stage.adapters_cut / case.tp + stage.adapters_whole
    shards = np.where(case.zero >= 1, case.replicas, 1.0)
    sharded = dense / shards + experts / np.where(case.zero >= 1, case.replicas * case.tp / case.ep, 1.0)
    whole = np.where(case.zero >= 3, sharded, dense + experts)
    return StateBytes(
        weights=np.where(case.zero >= 3, 0.0, whole * case.element),
        base=base,
        gradients=whole * FP32_BYTES,
        masters=sharded * np.where((case.element < FP32_BYTES) | (case.zero >= 3), FP32_BYTES, 0.0),
        optimizer=sharded * ADAM_BYTES,
    )


def in_flight(stage: Array, pp: Array, vpp: Array, micro_batches: Array) -> Array:
    """Micro-batches whose activations a stage stores at once, in units of the whole stage.

    1F1B: pp - stage. Interleaved: 2 (pp - stage - 1) + (vpp - 1) pp warm-up chunks and the one in hand, each 1/vpp of
    the stage (Megatron `get_pp_rank_microbatches`; at stage 0 Korthikanti's factor 1 + (pp - 1) / (pp vpp)). Never more
    than there are.
    """
    chunks = np.where(vpp > 1, 2.0 * (pp - stage - 1.0) + (vpp - 1.0) * pp + 1.0, pp - stage)
    return np.minimum(chunks / vpp, micro_batches)


def weight_gradient_bytes(stage: StageParts, case: TrainingCase, habits: MemoryHabits) -> Array:
    """Weight gradients in the run's precision beside the fp32 ones: see `MemoryHabits.wgrad_buffers`."""
    return (stage.shapes if habits.wgrad_buffers else stage.largest) * case.element / case.tp


def gathered_bytes(stage: StageParts, case: TrainingCase, habits: MemoryHabits) -> Array:
    """Whole layers that ZeRO-3 holds at once in the run's precision, with the fp32 gradient of one of them."""
    layer = (stage.sharded / case.tp + stage.replicated + stage.experts / case.ep) / stage.layers
    return np.where(case.zero >= 3, layer * (habits.gathered_layers * case.element + FP32_BYTES), 0.0)


@dataclass(frozen=True, eq=False)
class TrainingMoment:
    """What is alive beside the model state at one moment, bytes."""

    activations: Array
    logits: Array
    workspace: Array

    @property
    def total(self) -> Array:
        """All of it."""
        return self.activations + self.logits + self.workspace


def _fullest(moments: list[TrainingMoment]) -> TrainingMoment:
    best = moments[0]
    for other in moments[1:]:
        wins = other.total > best.total
        best = TrainingMoment(
            *(np.where(wins, getattr(other, f.name), getattr(best, f.name)) for f in fields(TrainingMoment))
        )
    return best


def training_moments(
    stage: StageParts, widths: BlockWidths, case: TrainingCase, habits: MemoryHabits
) -> list[TrainingMoment]:
    """The moments that may be the fullest: backward of a block, loss, gradient of the embedding."""
    kept = kept_block_bytes(widths, case, gathers_keys=habits.gathers_keys) * case.rank_tokens * stage.layers
    flight = in_flight(stage.index, case.pp, case.vpp, case.micro_batches)
    stored = kept * flight
    if habits.keeps_outputs:
        output = widths.hidden * case.element / np.where(case.sequence_parallel, case.tp, 1.0) * case.rank_tokens
        stored = stored + np.where(case.vpp > 1, output * flight * case.vpp, 0.0)
    again = stored_block_bytes(widths, case, case.scores, gathers_keys=habits.gathers_keys) * case.rank_tokens
    again = np.where(case.recompute == FULL_RECOMPUTE, again, 0.0)
    gathered = gathered_bytes(stage, case, habits)
    wgrad = weight_gradient_bytes(stage, case, habits)
    temporaries = backward_block_bytes(widths, case) * case.rank_tokens
    none = np.zeros_like(kept)
    buffers = wgrad if habits.wgrad_buffers else none
    embedding = stage.embedding / case.tp * case.element
    last = _loss(stage, widths, case, habits)
    return [
        TrainingMoment(stored, none, again + temporaries + wgrad + gathered),
        TrainingMoment(stored, last.logits, last.workspace + buffers + gathered),
        TrainingMoment(kept * np.maximum(flight - 1.0 / case.vpp, 0.0), none, embedding + buffers + gathered),
    ]


def _loss(stage: StageParts, widths: BlockWidths, case: TrainingCase, habits: MemoryHabits) -> TrainingMoment:
    """The loss on the stage of the head: logits cut over tp, those that are kept and a part of the others; input and
    output of the final norm, the gathered input of the projection and its gradient; the weight gradient of the
    projection."""
    has_head = stage.vocabulary > 0
    rows, tokens = stage.vocabulary / case.tp, case.rank_tokens * case.head_share
    entries = rows * tokens
    chunk = HEAD_TEMPORARIES * np.minimum(entries, float(habits.head_elements))
    if habits.kept_logits:
        entries = np.minimum(entries, float(habits.kept_logits + habits.head_elements))
    stream = widths.hidden * case.element * (2.0 / np.where(case.sequence_parallel, case.tp, 1.0) + 2.0)
    gradient = 0.0 if stage.frozen else widths.hidden * case.element
    return TrainingMoment(
        activations=np.zeros_like(rows),
        logits=(case.element + habits.logit_bytes) * entries + chunk,
        workspace=np.where(has_head, stream * tokens + rows * gradient, 0.0),
    )


def communicator_bytes(habits: MemoryHabits, *degrees: Array) -> Array:
    """NCCL buffers: one set per group of more than one rank."""
    return sum((degree > 1) * habits.communicator_gib * GIB for degree in degrees) + np.zeros_like(degrees[0])


def stage_terms(stage: StageParts, widths: BlockWidths, case: TrainingCase, habits: MemoryHabits) -> MemoryTerms:
    """Memory of one stage at its fullest moment."""
    state = state_bytes(stage, case)
    moment = _fullest(training_moments(stage, widths, case, habits))
    stay = np.ones_like(case.tp, dtype=np.bool_)
    return MemoryTerms(
        weights=state.weights,
        base=state.base,
        gradients=state.gradients,
        masters=state.masters,
        optimizer=state.optimizer,
        activations=moment.activations,
        logits=moment.logits,
        kv_cache=np.zeros_like(case.tp),
        workspace=moment.workspace,
        communicators=communicator_bytes(habits, case.tp, case.pp, case.dp * case.cp),
        reserve=habits.reserve * moment.total,
        host=np.zeros_like(case.tp),
        weights_stay=stay,
        state_stays=stay,
    )


def fullest_stage(first: MemoryTerms, last: MemoryTerms) -> MemoryTerms:
    """Per candidate, the terms of the stage that needs more."""
    wins = last.peak_bytes > first.peak_bytes
    chosen = {
        f.name: np.where(wins, getattr(last, f.name), getattr(first, f.name))
        for f in fields(MemoryTerms)
        if f.name not in ("is_copy", "routes")
    }
    return MemoryTerms(**chosen, is_copy=first.is_copy)


def training_terms(spec: ModelSpec, case: TrainingCase, habits: MemoryHabits) -> MemoryTerms:
    """Memory of a training step on its fullest stage."""
    fused = {"fused_pointwise": habits.fused_pointwise, "fused_rotary": habits.fused_rotary}
    widths = block_widths(spec, **fused, element=case.element)
    own = {"own_fullest": case.own_fullest, "own_last": case.own_last}
    stages = [stage_parts(spec, case.pp, last=end, **own) for end in (False, True)]
    return fullest_stage(*(stage_terms(stage, widths, case, habits) for stage in stages))
