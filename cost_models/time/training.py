"""Time of training steps: forward, backward and recomputation through a pipeline, reductions, optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cost_models.candidates import FULL_RECOMPUTE, SELECTIVE_RECOMPUTE, Array, Candidates
from cost_models.engines.machine import Machine
from cost_models.packing import EQUAL, Packing
from cost_models.stages import stage_layers
from cost_models.terms import Terms
from cost_models.time.data_parallel import (
    accumulation,
    gradient_reduce,
    optimizer,
    parameter_gather,
    rank_params,
    weight_gather,
)
from cost_models.time.layer import TrainedLayerTime, context_backward, trained_layer
from cost_models.time.pipeline import fill_and_drain, stage_send
from cost_models.time.vocabulary import head_and_loss
from plans.model import ModelSpec


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """One optimizer step on `samples` sequences of `tokens` tokens on the average, over all ranks; the head and the
    loss run on `head_tokens` of each (0: all).

    attended: the length that their attention costs as much as, E[n^2] / E[n] (0: that of equal ones). packing: how
    unequal dp ranks and micro-batches are.
    """

    spec: ModelSpec
    samples: Array | float
    tokens: Array | float
    head_tokens: float = 0.0
    attended: float = 0.0
    packing: Packing = EQUAL

    @property
    def head_share(self) -> Array | float:
        """Share of the tokens that the head and the loss run on."""
        return self.head_tokens / self.tokens if self.head_tokens else 1.0


@dataclass(frozen=True, eq=False)
class _Slot:
    """Seconds of one micro-batch, forward and backward, on an inner stage, by term; and of the last stage's head."""

    terms: dict[str, Array]
    backward: Array
    head: Array
    layers: Array
    last_layers: Array

    @property
    def inner(self) -> Array:
        """Seconds on an inner stage."""
        total = np.zeros_like(self.layers)
        for seconds in self.terms.values():
            total = total + seconds
        return total

    @property
    def last(self) -> Array:
        """Seconds on the last stage."""
        return self.inner * (self.last_layers / self.layers) + self.head


def training_time(machine: Machine, step: TrainingStep, candidates: Candidates) -> Terms:
    """Terms of one optimizer step, seconds."""
    c = candidates
    slot = _slot(machine, step, c)
    inner, last = slot.inner, slot.last
    terms = {name: seconds * c.micro_batches for name, seconds in slot.terms.items()}
    terms["head_and_loss"] = np.maximum(last - inner, 0.0) * c.micro_batches
    terms["imbalance"] = (step.packing.imbalance - 1.0) * np.maximum(inner, last) * c.micro_batches
    terms["bubble"] = fill_and_drain(
        c.vpp, inner * (step.spec.layers / slot.layers) + slot.head, np.maximum(inner, last)
    )
    terms["pipeline_p2p"] = pipeline_sends(machine, step, c)
    terms["gradient_reduce"] = gradient_reduce(machine, step.spec, c, slot.backward)
    terms["parameter_gather"] = parameter_gather(machine, step.spec, c, slot.backward)
    terms["accumulation"] = c.micro_batches * accumulation(machine, rank_params(step.spec, c))
    terms["optimizer"] = optimizer(machine, step.spec, c)
    terms["overhead"] = machine.constants.step_s + c.micro_batches * machine.constants.micro_batch_s
    return Terms(terms)


def micro_batch_tokens(step: TrainingStep, candidates: Candidates) -> Array:
    """Tokens of one rank in one micro-batch: the mean, or the width of all of them in a pipeline."""
    c = candidates
    return step.samples * step.tokens / (c.dp * c.micro_batches * c.cp) * step.packing.width(c)


def _slot(machine: Machine, step: TrainingStep, candidates: Candidates) -> _Slot:
    c, spec = candidates, step.spec
    tokens = micro_batch_tokens(step, c)
    layer = trained_layer(machine, spec, c, tokens, step.attended or step.tokens)
    recompute = recomputation(machine, layer, c)
    backward = backward_time(machine, layer)
    layers, last_layers = stage_layers(spec, c)
    terms = {
        "linears": layer.linears + layer.linears_backward,
        "attention": layer.attention * (1.0 + machine.constants.attention_backward_ratio),
        "streaming": layer.streaming * 3.0,
        "recompute": recompute,
        "tensor_parallel": 2.0 * layer.tensor_parallel,
        "context_parallel": (1.0 + context_backward(machine)) * layer.context_parallel,
        "expert_parallel": 2.0 * layer.expert_parallel,
        "gaps": 3.0 * layer.gaps,
        "weight_gather": weight_gather(machine, spec, c, layer, backward + recompute),
        "host": host_wait(machine, layer.gpu, backward, recompute, c),
    }
    return _Slot(
        terms={name: seconds * layers for name, seconds in terms.items()},
        backward=(backward + recompute) * layers,
        head=head_and_loss(machine, spec, tokens, tokens * step.head_share, c),
        layers=layers,
        last_layers=last_layers,
    )


def backward_time(machine: Machine, layer: TrainedLayerTime) -> Array:
    """Backward seconds of a layer: two GEMMs for each, the attention core's ratio, twice the streamed bytes, and the
    same communication as forward."""
    return (
        layer.linears_backward
        + layer.attention * machine.constants.attention_backward_ratio
        + layer.streaming * 2.0
        + layer.tensor_parallel
        + context_backward(machine) * layer.context_parallel
        + layer.expert_parallel
        + 2.0 * layer.gaps
    )


def recomputation(machine: Machine, layer: TrainedLayerTime, candidates: Candidates) -> Array:
    """Seconds of a layer's recomputed forward: the whole layer, or the attention core.

    The fused attention core recomputes its scores in its own backward, so that selective recomputation costs only
    the repeated kernel (Korthikanti et al. 2022, section 5), and the keys that it gathers.
    """
    full = candidates.recompute == FULL_RECOMPUTE
    selective = candidates.recompute == SELECTIVE_RECOMPUTE
    gathered = layer.context_parallel * machine.constants.gathers_context
    return np.where(full, layer.gpu, np.where(selective, layer.attention + gathered, 0.0))


def host_wait(machine: Machine, forward: Array, backward: Array, recompute: Array, candidates: Candidates) -> Array:
    """Seconds of a layer in which the GPU waits for the CPU to launch: what the launch time exceeds the GPU time by."""
    constants = machine.constants
    again = np.where(candidates.recompute == FULL_RECOMPUTE, constants.host_forward_layer_s, 0.0)
    wait = np.maximum(constants.host_forward_layer_s - forward, 0.0)
    return wait + np.maximum(constants.host_backward_layer_s + again - backward - recompute, 0.0)


def pipeline_sends(machine: Machine, step: TrainingStep, candidates: Candidates) -> Array:
    """Seconds of sends between stages that are on the critical path: each slot sends one activation and one gradient
    of [tokens, hidden] (a part by each tp rank), vpp times when interleaved."""
    c = candidates
    one = stage_send(machine, step.spec, c, micro_batch_tokens(step, c))
    slots = c.micro_batches + (c.pp - 1) / c.vpp
    return np.where(c.pp > 1, 2.0 * one * slots * c.vpp * (1.0 - machine.constants.pipeline_overlap), 0.0)
