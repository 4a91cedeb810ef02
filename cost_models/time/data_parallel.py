"""Data parallelism: what a rank holds, gradients reduced and weights gathered over dp x cp, the optimizer's step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cost_models.candidates import Array, Candidates, Flags
from cost_models.engines.machine import Machine
from cost_models.stages import stage_layers
from cost_models.time import operations
from cost_models.time.layer import LayerTime
from plans.layout import adapter_elements
from plans.model import Head, ModelSpec


def rank_params(spec: ModelSpec, candidates: Candidates) -> Array:
    """Parameters of the fullest rank: an inner stage with an embedding (and the head too, without a pipeline); of a
    model with adapters those that are trained, the adapters."""
    dense, experts = _held_params(spec, candidates)
    return dense + experts


def _held_params(spec: ModelSpec, candidates: Candidates) -> tuple[Array, Array]:
    """The rank's share of what tp cuts, and its experts, which lie whole on the ranks that hold them."""
    c = candidates
    layers, _ = stage_layers(spec, c)
    if spec.lora:
        cut, whole = adapter_elements(spec)
        return layers * (cut / c.tp + whole), np.zeros_like(c.tp)
    experts = float(spec.expert_params * spec.experts * spec.expert_layers / spec.layers)  # of a layer, in the mean
    vocabulary = float(spec.padded_vocab * spec.hidden)
    own_head = spec.head is Head.LM and not spec.tied_embeddings
    ends = vocabulary * np.where(c.pp == 1, 1.0 + own_head, 1.0)
    dense = (layers * (spec.blocks_params / spec.layers - experts) + ends) / c.tp
    return dense, layers * experts / c.ep


@dataclass(frozen=True, slots=True)
class _Replicated:
    """Parameters of a rank of which `size` ranks have the same, `per_node` of them on one node."""

    params: Array
    size: Array
    per_node: Array


def _replicated(spec: ModelSpec, candidates: Candidates) -> list[_Replicated]:
    """What dp x cp ranks hold alike, and the experts, which every run of ep ranks of a stage holds once."""
    c = candidates
    dense, experts = _held_params(spec, c)
    parts = [_Replicated(dense, *_data_group(c))]
    if spec.experts:
        size = c.dp * c.cp * c.tp / c.ep
        parts.append(_Replicated(experts, size, c.ranks_per_node(c.ep, size)))
    return parts


def _shard_params(spec: ModelSpec, candidates: Candidates, sharded: Flags) -> Array:
    """Parameters that a rank updates: its part of each where the optimizer is sharded over the replicas."""
    shards = [part.params / np.where(sharded, part.size, 1.0) for part in _replicated(spec, candidates)]
    total: Array = sum(shards[1:], shards[0])
    return total


def _data_group(candidates: Candidates) -> tuple[Array, Array]:
    """Size of the group that reduces gradients (dp x cp, tp ranks apart), and its ranks on one node."""
    size = candidates.dp * candidates.cp
    return size, candidates.ranks_per_node(candidates.tp, size)


def gradient_reduce(machine: Machine, spec: ModelSpec, candidates: Candidates, backward: Array) -> Array:
    """Exposed seconds of the gradient all-reduce, or reduce-scatter with a sharded optimizer.

    It may hide behind the backward pass of the last micro-batch, `data_overlap` of it.
    """
    constants = machine.constants
    if constants.shards_weights:
        return np.zeros_like(candidates.dp)
    seconds = np.zeros_like(candidates.dp)
    for part in _replicated(spec, candidates):
        message = part.params * constants.gradient_bytes
        whole = machine.kernels.all_reduce(message, part.size, part.per_node)
        scattered = machine.kernels.reduce_scatter(message, part.size, part.per_node)
        seconds = seconds + np.where(candidates.shard_optimizer, scattered, whole)
    exposed: Array = seconds - np.minimum(constants.data_overlap * seconds, backward)
    return exposed + tied_embedding_reduce(machine, spec, candidates)


def tied_embedding_reduce(machine: Machine, spec: ModelSpec, candidates: Candidates) -> Array:
    """Seconds to sum the gradients of tied embeddings of the first and the last stage (Narayanan et al. 2021)."""
    c = candidates
    if not (spec.tied_embeddings and spec.head is Head.LM) or spec.lora:
        return np.zeros_like(c.pp)
    message = spec.padded_vocab * spec.hidden / c.tp * machine.constants.gradient_bytes
    two = np.full_like(c.pp, 2.0)
    seconds = machine.kernels.all_reduce(message, two, np.where(c.nodes > 1, 1.0, 2.0))
    return np.where(c.pp > 1, seconds, 0.0)


def parameter_gather(machine: Machine, spec: ModelSpec, candidates: Candidates, backward: Array) -> Array:
    """Exposed seconds of gathering updated weights after a sharded optimizer step; `gather_overlap` of it hides behind
    the next forward, taken as half of a backward."""
    constants = machine.constants
    if constants.shards_weights:
        return np.zeros_like(candidates.dp)
    seconds = np.zeros_like(candidates.dp)
    for part in _replicated(spec, candidates):
        gather = machine.kernels.all_gather(part.params * machine.element_bytes, part.size, part.per_node)
        seconds = seconds + np.where(candidates.shard_optimizer, gather, 0.0)
    return seconds - np.minimum(constants.gather_overlap * seconds, 0.5 * backward)


def weight_gather(machine: Machine, spec: ModelSpec, candidates: Candidates, layer: LayerTime, after: Array) -> Array:
    """Exposed seconds per layer and micro-batch where weights are sharded over dp (ZeRO-3): gather before forward,
    gather again and scatter gradients in backward, prefetched one layer ahead.

    What is not hidden: the excess of communication over compute, and the share 1 - data_overlap of the rest.
    """
    constants, (size, per_node) = machine.constants, _data_group(candidates)
    if not constants.shards_weights:
        return np.zeros_like(size)
    gather = layer_gather(machine, spec, candidates)
    trained = sum(adapter_elements(spec)) or spec.layer_params
    message = trained / candidates.tp * constants.gradient_bytes
    both = gather + machine.kernels.reduce_scatter(message, size, per_node)
    return _exposed(machine, gather, layer.gpu) + _exposed(machine, both, after)


def forward_weight_gather(machine: Machine, spec: ModelSpec, candidates: Candidates, layer: LayerTime) -> Array:
    """Exposed seconds per layer and forward pass of gathering weights that are sharded over dp."""
    if not machine.constants.shards_weights:
        return np.zeros_like(candidates.dp)
    return _exposed(machine, layer_gather(machine, spec, candidates), layer.gpu)


def layer_gather(machine: Machine, spec: ModelSpec, candidates: Candidates) -> Array:
    """Seconds to gather one layer's weights that are sharded over dp x cp."""
    size, per_node = _data_group(candidates)
    message = spec.layer_params / candidates.tp * machine.element_bytes
    return machine.kernels.all_gather(message, size, per_node)


def _exposed(machine: Machine, communication: Array, compute: Array) -> Array:
    return communication - machine.constants.data_overlap * np.minimum(communication, compute)


def accumulation(machine: Machine, params: Array | float) -> Array | float:
    """Seconds to add the gradients of `params` local parameters of one micro-batch up in their buffer."""
    return params * (machine.constants.accumulate_bytes / machine.memory_bytes_per_s)


def optimizer(machine: Machine, spec: ModelSpec, candidates: Candidates) -> Array:
    """Seconds of clipping and Adam, on the local shard where the optimizer is sharded."""
    sharded = candidates.shard_optimizer | machine.constants.shards_weights
    return operations.optimizer_update(machine, _shard_params(spec, candidates, sharded))


def state_load(machine: Machine, spec: ModelSpec, candidates: Candidates) -> Array:
    """Seconds to bring an offloaded optimizer state (fp32 moments, and masters beside 16-bit weights) to the GPU and
    back."""
    params = _shard_params(spec, candidates, candidates.shard_optimizer)
    each = 8.0 if machine.element_bytes == 4 else 12.0
    return np.where(candidates.offload, 2.0 * each * params / machine.host_bytes_per_s, 0.0)
