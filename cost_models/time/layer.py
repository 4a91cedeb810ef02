"""One transformer layer on one rank: forward and backward seconds of a micro-batch, by part."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cost_models.candidates import Array, Candidates
from cost_models.distinct import distinct
from cost_models.engines.machine import Machine
from cost_models.time import operations
from plans.model import ModelSpec


@dataclass(frozen=True, eq=False)
class LayerTime:
    """Forward seconds of one layer, arrays [candidates]; communication is what is not hidden."""

    linears: Array
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

    def take(self, indices: NDArray[np.intp]) -> Self:
        """The candidates at `indices`, in that order."""
        return type(self)(**{f.name: getattr(self, f.name)[indices] for f in fields(self)})


@dataclass(frozen=True, eq=False)
class TrainedLayerTime(LayerTime):
    """Forward seconds of one layer, and the backward ones of its GEMMs."""

    linears_backward: Array


def forward_layer(
    machine: Machine,
    spec: ModelSpec,
    candidates: Candidates,
    tokens: Array,
    length: Array | float,
    *,
    generates: bool = False,
) -> LayerTime:
    """Forward time of a layer on `tokens` tokens of one rank (already divided by cp) in sequences of `length`.
    `generates`: tokens come to experts as they do in generation (`expert_gather`).

    Few candidates differ in what a layer sees: each such case is costed once.
    """
    c, tokens, lengths, inverse = _distinct_cases(candidates, tokens, length)
    linears = operations.linears(machine, spec, tokens, c.tp, c.ep)
    parts = _other_parts(machine, spec, c, tokens, lengths, generates=generates)
    return LayerTime(linears=linears, **parts).take(inverse)


def trained_layer(
    machine: Machine, spec: ModelSpec, candidates: Candidates, tokens: Array, length: Array | float
) -> TrainedLayerTime:
    """`forward_layer` with the backward pass of the GEMMs."""
    c, tokens, lengths, inverse = _distinct_cases(candidates, tokens, length)
    forward, backward = operations.linears_both_ways(machine, spec, tokens, c.tp, c.ep)
    parts = _other_parts(machine, spec, c, tokens, lengths, generates=False)
    return TrainedLayerTime(linears=forward, linears_backward=backward, **parts).take(inverse)


def _distinct_cases(
    candidates: Candidates, tokens: Array, length: Array | float
) -> tuple[Candidates, Array, Array, NDArray[np.intp]]:
    """What a layer sees, each case once: candidates, tokens and lengths; and which case every candidate is."""
    c, lengths = candidates, np.broadcast_to(np.asarray(length, dtype=np.float64), tokens.shape)
    first, inverse = distinct(tokens, lengths, c.tp, c.cp, c.ep, c.nodes, c.gpus_per_node, c.sequence_parallel)
    return c.take(first), tokens[first], lengths[first], inverse


def _other_parts(
    machine: Machine, spec: ModelSpec, candidates: Candidates, tokens: Array, length: Array, *, generates: bool
) -> dict[str, Array]:
    """Forward seconds of a layer's parts but its GEMMs."""
    c = candidates
    experts = (expert_gather if generates else expert_parallel)(machine, spec, c, tokens)
    attention = operations.attention_core(machine, spec, tokens, length, c.tp)
    return {
        "attention": attention,
        "streaming": operations.streaming(machine, spec, tokens, c.tp, c.sequence_parallel),
        "tensor_parallel": tensor_parallel(machine, spec, c, tokens),
        "context_parallel": context_parallel(machine, spec, c, tokens, attention),
        "expert_parallel": experts,
        "gaps": np.full_like(tokens, machine.constants.layer_gap_s),
    }


def tensor_parallel(machine: Machine, spec: ModelSpec, candidates: Candidates, tokens: Array) -> Array:
    """Exposed seconds of a layer's two all-reduces of [tokens, hidden] (Megatron-LM 2019, figure 4).

    With sequence parallelism each is a reduce-scatter and an all-gather of the same bytes.
    """
    c = candidates
    message, group = hidden_bytes(machine, spec, tokens), c.tensor_group
    whole = machine.kernels.all_reduce(message, *group)
    cut = machine.kernels.scattered_all_reduce(message, *group)
    hidden = 2.0 * np.where(c.sequence_parallel, cut, whole) * (1.0 - machine.constants.tensor_overlap)
    return hidden + adapter_reduces(machine, spec, c, tokens) if spec.lora else hidden


def adapter_reduces(machine: Machine, spec: ModelSpec, candidates: Candidates, tokens: Array) -> Array:
    """Half the seconds that the adapters of a layer exchange over tp, forward and backward together.

    Of a column-parallel linear the thin product [tokens, rank] is gathered and its gradient scattered under sequence
    parallelism, else its gradient is summed. Of a row-parallel one the gradient of B [hidden, rank] is summed, under
    sequence parallelism with all others once per step. All that is mostly latency.
    """
    assert spec.lora is not None
    c, group = candidates, candidates.tensor_group
    columns = sum(target in ("linear_qkv", "linear_fc1") for target in spec.lora.targets)
    thin = float(spec.lora.rank * machine.element_bytes)
    gathered = columns * machine.kernels.scattered_all_reduce(tokens * thin, *group)
    product = columns * machine.kernels.all_reduce(tokens * thin, *group)
    rows = len(spec.lora.targets) - columns
    gradient = rows * machine.kernels.all_reduce(np.full_like(tokens, spec.hidden * thin), *group)
    return 0.5 * np.where(c.sequence_parallel, gathered, product + gradient)


def hidden_reduce(machine: Machine, spec: ModelSpec, candidates: Candidates, tokens: Array) -> Array:
    """Seconds to sum [tokens, hidden] over tp."""
    return machine.kernels.all_reduce(hidden_bytes(machine, spec, tokens), *candidates.tensor_group)


def hidden_bytes(machine: Machine, spec: ModelSpec, tokens: Array) -> Array:
    """Bytes of [tokens, hidden] in the run's precision."""
    return tokens * float(spec.hidden * machine.element_bytes)


def context_parallel(
    machine: Machine, spec: ModelSpec, candidates: Candidates, tokens: Array, attention: Array
) -> Array:
    """Exposed seconds of a layer's keys and values on their way to cp ranks, forward.

    Around a ring they are hidden behind the attention core (Liu et al. 2023); gathered before it, they are not
    (Grattafiori et al. 2024, 3.3.2).
    """
    c = candidates
    width = float((spec.head_dim + spec.value_width) * machine.element_bytes)
    kv_bytes = tokens * np.maximum(spec.kv_heads / c.tp, 1.0) * width
    per_node = c.ranks_per_node(c.tp, c.cp)
    if machine.constants.gathers_context:
        return machine.kernels.all_gather(kv_bytes * c.cp, c.cp, per_node)
    ring: Array = (c.cp - 1) * machine.kernels.send(kv_bytes, per_node < c.cp)
    return np.maximum(ring - attention * (c.cp - 1) / c.cp, 0.0)


def context_backward(machine: Machine) -> float:
    """What of `context_parallel` the backward pass takes again: gathered keys are kept, and their gradients scattered
    once; a ring passes keys and gradients."""
    return 1.0 if machine.constants.gathers_context else 2.0


def expert_gather(machine: Machine, spec: ModelSpec, candidates: Candidates, tokens: Array) -> Array:
    """Seconds of an expert layer in generation, beside the sum over tp that a dense layer has too.

    The tp ranks of a replica have the same tokens: each runs its own experts on all of them. Where replicas share
    experts, their tokens are gathered and the sums scattered back.
    """
    c, replicas = candidates, candidates.joined_replicas
    if not spec.experts:
        return np.zeros_like(tokens)
    message = tokens * replicas * float(spec.hidden * machine.element_bytes)
    group = replicas, c.ranks_per_node(c.tp, replicas)
    gather = machine.kernels.all_gather(message, *group)
    both = gather + machine.kernels.reduce_scatter(message, *group)
    return np.where(replicas > 1.0, both * (spec.expert_layers / spec.layers), 0.0)


def expert_parallel(machine: Machine, spec: ModelSpec, candidates: Candidates, tokens: Array) -> Array:
    """Seconds of the two all-to-alls that bring tokens to their experts and back; the mean of a model's layers."""
    if not spec.experts:
        return np.zeros_like(tokens)
    c = candidates
    message = tokens / c.tp * float(spec.experts_per_token * spec.hidden * machine.element_bytes)
    one = machine.kernels.all_to_all(message, c.ep, c.ranks_per_node(np.ones_like(c.tp), c.ep))
    return 2.0 * (spec.expert_layers / spec.layers) * one
