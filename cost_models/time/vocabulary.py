"""The vocabulary's part of a step: head and loss, and the collectives of what is cut over the vocabulary."""

from __future__ import annotations

import numpy as np

from cost_models.candidates import Array, Candidates
from cost_models.engines.machine import Machine
from cost_models.time import operations
from cost_models.time.layer import hidden_reduce
from plans.model import Head, ModelSpec

LOSS_BYTES = (4.0, 12.0)
"""Bytes per token that log-probs reduce over tp: the maximum; then the label's logit, the sum and the entropy's sum."""
CHOICE_BYTES = 32.0
"""Bytes per sequence and tp rank that sampling gathers: score, token, logit and normaliser of its best entry."""


def head_and_loss(
    machine: Machine, spec: ModelSpec, tokens: Array, head_tokens: Array, candidates: Candidates
) -> Array:
    """Seconds of the head's three GEMMs, the loss and their collectives on `head_tokens` of the `tokens` of one
    micro-batch of a training step: the gradient of the head's input is summed over tp, as is, without a pipeline, the
    output of the embedding. Logits that are not kept for the backward pass are computed twice."""
    c = candidates
    forward, backward = operations.head_both_ways(machine, spec, head_tokens, c.tp)
    if machine.habits.kept_logits:
        entries = np.maximum(head_tokens * (spec.padded_vocab / c.tp), 1.0)
        forward = forward * (1.0 + np.maximum(1.0 - machine.habits.kept_logits / entries, 0.0))
    loss = operations.loss(machine, spec, head_tokens, c.tp) * (1.0 + machine.constants.loss_backward_ratio)
    hidden = hidden_reduce(machine, spec, c, tokens)
    reduced = hidden if spec.head is Head.LM else np.zeros_like(hidden)
    loss = loss + loss_reduces(machine, spec, head_tokens, c)
    return forward + backward + loss + reduced + np.where(c.pp == 1, hidden, 0.0)


def head_and_log_probs(
    machine: Machine, spec: ModelSpec, tokens: Array, head_tokens: Array, candidates: Candidates, *, scored: bool
) -> Array:
    """Seconds of the head on `head_tokens` tokens of a forward pass and, where scored, of their log-probs; and of the
    embedding's sum over tp on all `tokens`, which only a rank that is the whole pipeline has beside the head."""
    c = candidates
    seconds = operations.head(machine, spec, head_tokens, c.tp)
    if scored:
        seconds = seconds + operations.loss(machine, spec, head_tokens, c.tp)
        seconds = seconds + loss_reduces(machine, spec, head_tokens, c)
    return seconds + np.where(c.pp == 1, hidden_reduce(machine, spec, c, tokens), 0.0)


def head_and_choice(machine: Machine, spec: ModelSpec, rows: Array, candidates: Candidates) -> Array:
    """Seconds of the head in a decode step, of sampling, and of gathering the best entry of every part of the
    vocabulary."""
    entries = rows * (spec.padded_vocab / candidates.tp)
    sampling = entries * (machine.constants.sampling_bytes / machine.memory_bytes_per_s)
    gather = machine.kernels.all_gather(rows * CHOICE_BYTES * candidates.tp, *candidates.tensor_group)
    return operations.head(machine, spec, rows, candidates.tp) + sampling + gather


def loss_reduces(machine: Machine, spec: ModelSpec, tokens: Array, candidates: Candidates) -> Array:
    """Seconds of the reductions of vocabulary-parallel log-probs (Megatron-LM 2019, section 3)."""
    if spec.head is Head.VALUE:
        return np.zeros_like(tokens)
    group = candidates.tensor_group
    return sum((machine.kernels.all_reduce(tokens * each, *group) for each in LOSS_BYTES), start=np.zeros_like(tokens))
