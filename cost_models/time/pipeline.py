"""Pipelines: how many slots a schedule takes, for even and uneven stages."""

from __future__ import annotations

import numpy as np

from cost_models.candidates import Array, Candidates
from cost_models.engines.machine import Machine
from plans.model import ModelSpec


def fill_and_drain(vpp: Array, total: Array, slowest: Array) -> Array:
    """Seconds that a 1F1B schedule takes beyond micro_batches x the slowest stage.

    `total` and `slowest` are forward plus backward of one micro-batch on all stages and on the slowest one. Every other
    stage's time is waited for once, 1/vpp of it when interleaved (Narayanan et al. 2021, section 2.2.2).
    """
    return (total - slowest) / vpp


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
