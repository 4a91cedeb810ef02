"""One transformer layer on one rank: forward and backward seconds of a micro-batch, by part."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from cost_models.candidates import Array, Candidates
from cost_models.time import collectives, operations
from cost_models.time.distinct import distinct
from cost_models.time.machine import Machine
from plans.model import ModelSpec


@dataclass(frozen=True, eq=False)
class LayerTime:
    """Forward seconds of one layer, arrays [candidates], and the backward ones of its GEMMs; communication is what is
    not hidden."""

    linears: Array
    linears_backward: Array
    attention: Array
    streaming: Array
    tensor_parallel: Array
    context_parallel: Array
    expert_parallel: Array
    gaps: Array

    @property
    def gpu(self) -> Array:
        """Seconds that the GPU is busy or communicates."""
        compute = self.linears + self.attention + self.streaming
        return compute + self.tensor_parallel + self.context_parallel + self.expert_parallel + self.gaps

    def take(self, indices: NDArray[np.intp]) -> LayerTime:
        """The candidates at `indices`, in that order."""
        return LayerTime(**{f.name: getattr(self, f.name)[indices] for f in fields(self)})


def forward_layer(
    machine: Machine, spec: ModelSpec, candidates: Candidates, tokens: Array, length: Array | float
) -> LayerTime:
    """Forward time of a layer on `tokens` tokens of one rank (already divided by cp) in sequences of `length`.

    Few candidates differ in what a layer sees: each such case is costed once.
    """
    c, lengths = candidates, np.broadcast_to(np.asarray(length, dtype=np.float64), tokens.shape)
    first, inverse = distinct(tokens, lengths, c.tp, c.cp, c.ep, c.nodes, c.gpus_per_node, c.sequence_parallel)
    return _layer_time(machine, spec, c.take(first), tokens[first], lengths[first]).take(inverse)


def _layer_time(machine: Machine, spec: ModelSpec, candidates: Candidates, tokens: Array, length: Array) -> LayerTime:
    c = candidates
    attention = operations.attention_core(machine, spec, tokens, length, c.tp, c.cp)
    linears, linears_backward = operations.linears(machine, spec, tokens, c.tp, c.ep)
    return LayerTime(
        linears=linears,
        linears_backward=linears_backward,
        attention=attention,
        streaming=operations.streaming(machine, spec, tokens, c.tp, c.sequence_parallel),
        tensor_parallel=tensor_parallel(machine, spec, c, tokens),
        context_parallel=context_parallel(machine, spec, c, tokens, attention),
        expert_parallel=expert_parallel(machine, spec, c, tokens),
        gaps=np.full_like(tokens, machine.engine.layer_gap_s),
    )


def tensor_parallel(machine: Machine, spec: ModelSpec, candidates: Candidates, tokens: Array) -> Array:
    """Exposed seconds of a layer's two all-reduces of [tokens, hidden] (Megatron-LM 2019, figure 4).

    With sequence parallelism each is a reduce-scatter and an all-gather of the same bytes; a ring all-reduce is the
    two in turn, so that the time is the same where the library is as good at either.
    """
    c = candidates
    seconds = 2.0 * hidden_reduce(machine, spec, c, tokens)
    if machine.kernels is not None:
        message, group = tokens * float(spec.hidden * machine.element_bytes), c.tensor_group
        cut = collectives.reduce_scatter(machine, message, *group) + collectives.all_gather(machine, message, *group)
        return np.where(c.sequence_parallel, 2.0 * cut, seconds) * (1.0 - machine.engine.tensor_overlap)
    halves = 0.5 / machine.engine.reduce_scatter_efficiency + 0.5 / machine.engine.all_gather_efficiency
    return seconds * np.where(c.sequence_parallel, halves, 1.0) * (1.0 - machine.engine.tensor_overlap)


def hidden_reduce(machine: Machine, spec: ModelSpec, candidates: Candidates, tokens: Array) -> Array:
    """Seconds to sum [tokens, hidden] over tp."""
    message = tokens * float(spec.hidden * machine.element_bytes)
    return collectives.all_reduce(machine, message, *candidates.tensor_group)


def context_parallel(
    machine: Machine, spec: ModelSpec, candidates: Candidates, tokens: Array, attention: Array
) -> Array:
    """Exposed seconds of passing keys and values around the ring of cp ranks, hidden behind the attention core."""
    c = candidates
    kv_bytes = tokens * 2.0 * np.maximum(spec.kv_heads / c.tp, 1.0) * float(spec.head_dim * machine.element_bytes)
    across = c.ranks_per_node(c.tp, c.cp) < c.cp
    ring: Array = (c.cp - 1) * collectives.point_to_point(machine, kv_bytes, across)
    return np.maximum(ring - attention * (c.cp - 1) / c.cp, 0.0)


def expert_parallel(machine: Machine, spec: ModelSpec, candidates: Candidates, tokens: Array) -> Array:
    """Seconds of the two all-to-alls that bring tokens to their experts and back."""
    if not spec.experts:
        return np.zeros_like(tokens)
    c = candidates
    message = tokens * float(spec.experts_per_token * spec.hidden * machine.element_bytes)
    return 2.0 * collectives.all_to_all(machine, message, c.ep, c.ranks_per_node(c.tp, c.ep))
