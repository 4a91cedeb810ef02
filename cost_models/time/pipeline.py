"""Pipelines: how many slots a schedule takes, for even and uneven stages."""

from __future__ import annotations

import numpy as np

from cost_models.candidates import Array, Candidates
from cost_models.engines.machine import Machine
from plans.model import ModelSpec


def stage_layers(spec: ModelSpec, pp: Array) -> tuple[Array, Array]:
    """Layers of an inner stage and of the last one: the last takes what full stages leave (Llama-3's 126 over 8)."""
    inner = np.ceil(spec.layers / pp)
    return inner, np.maximum(spec.layers - inner * (pp - 1), 0.0)


def fill_and_drain(pp: Array, vpp: Array, inner: Array, last: Array) -> Array:
    """Seconds that a 1F1B schedule takes beyond micro_batches x the slowest stage.

    `inner` and `last` are forward plus backward of one micro-batch on an inner and on the last stage. Every other
    stage's time is waited for once, 1/vpp of it when interleaved (Narayanan et al. 2021, section 2.2.2).
    """
    total = inner * (pp - 1) + last
    return (total - np.maximum(inner, last)) / vpp


def stage_send(machine: Machine, spec: ModelSpec, candidates: Candidates, tokens: Array) -> Array:
    """Seconds to send the activations of `tokens` tokens to the next stage, over the network on a mesh of several
    nodes: the pipeline waits for its slowest boundary.

    Where tp ranks send a part each, the receivers gather the parts inside the node, unless they go on in parts
    (sequence parallelism).
    """
    c = candidates
    message = tokens * float(spec.hidden * machine.element_bytes)
    if not machine.constants.splits_sends:
        parts = np.where(c.sequence_parallel, c.tp, 1.0)
        return machine.kernels.send(message / parts, c.nodes > 1)
    gather = machine.kernels.all_gather(message, *c.tensor_group)
    return machine.kernels.send(message / c.tp, c.nodes > 1) + np.where(c.sequence_parallel, 0.0, gather)
