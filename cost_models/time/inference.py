"""Time of one forward pass over a batch (log-probs, values, rewards), and the prefill of generation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cost_models.candidates import Array, Candidates
from cost_models.engines.machine import Machine
from cost_models.packing import EQUAL, Packing
from cost_models.stages import stage_layers
from cost_models.terms import Terms
from cost_models.time.data_parallel import forward_weight_gather, rank_params
from cost_models.time.layer import forward_layer
from cost_models.time.pipeline import fill_and_drain, stage_send
from cost_models.time.vocabulary import head_and_log_probs
from plans.model import ModelSpec


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """`samples` sequences of `tokens` tokens on the average, over all ranks. The head runs on `head_tokens` of each
    sequence, and `scored` says whether log-probs follow it.

    attended: the length that their attention costs as much as, E[n^2] / E[n] (0: that of equal ones). packing: how
    unequal dp ranks and micro-batches are. generates: it computes prompts to go on with.
    """

    spec: ModelSpec
    samples: Array | float
    tokens: Array | float
    head_tokens: Array | float
    scored: bool = True
    attended: float = 0.0
    packing: Packing = EQUAL
    generates: bool = False


def inference_time(machine: Machine, work: ForwardPass, candidates: Candidates) -> Terms:
    """Terms of one forward call, seconds."""
    return Terms(forward_terms(machine, work, candidates, candidates.micro_batches))


def forward_terms(machine: Machine, work: ForwardPass, candidates: Candidates, passes: Array) -> dict[str, Array]:
    """Terms of `passes` forward passes per dp rank through the pipeline."""
    c, spec = candidates, work.spec
    sequences = work.samples / (c.dp * passes) * work.packing.width(c)
    tokens = sequences * work.tokens / c.cp
    layer = forward_layer(machine, spec, c, tokens, work.attended or work.tokens, generates=work.generates)
    layers, last_layers = stage_layers(spec, c)
    parts = {
        "linears": layer.linears,
        "attention": layer.attention,
        "streaming": layer.streaming,
        "tensor_parallel": layer.tensor_parallel,
        "context_parallel": layer.context_parallel,
        "expert_parallel": layer.expert_parallel,
        "gaps": layer.gaps,
        "weight_gather": forward_weight_gather(machine, spec, c, layer),
        "host": np.maximum(forward_host_s(machine, generates=work.generates) - layer.gpu, 0.0),
    }
    one_layer = layer.gpu + parts["weight_gather"] + parts["host"]
    head_tokens = sequences * work.head_tokens / c.cp
    head = head_and_log_probs(machine, spec, tokens, head_tokens, c, scored=work.scored)
    inner, last = layers * one_layer, last_layers * one_layer + head
    terms = {name: seconds * layers * passes for name, seconds in parts.items()}
    terms["head_and_loss"] = np.maximum(last - inner, 0.0) * passes
    terms["imbalance"] = (work.packing.imbalance - 1.0) * np.maximum(inner, last) * passes
    terms["bubble"] = fill_and_drain(np.ones_like(c.pp), spec.layers * one_layer + head, np.maximum(inner, last))
    terms["pipeline_p2p"] = forward_sends(machine, spec, c, tokens, passes)
    terms["overhead"] = passes * machine.constants.micro_batch_s
    return terms


def forward_host_s(machine: Machine, *, generates: bool) -> float:
    """Seconds in which the CPU launches a layer without gradients; `generates`: in the prefill of a generation."""
    constants = machine.constants
    ratio = constants.prefill_host_ratio if generates else constants.inference_host_ratio
    return constants.host_forward_layer_s * ratio


def forward_sends(machine: Machine, spec: ModelSpec, candidates: Candidates, tokens: Array, passes: Array) -> Array:
    """Seconds of sends between stages: one [tokens, hidden] activation per slot."""
    c = candidates
    one = stage_send(machine, spec, c, tokens)
    return np.where(c.pp > 1, one * (passes + c.pp - 1) * (1.0 - machine.constants.pipeline_overlap), 0.0)


def weight_load(machine: Machine, spec: ModelSpec, candidates: Candidates) -> Array:
    """Seconds to bring a frozen model's offloaded weights to the GPU."""
    seconds = rank_params(spec, candidates) * (machine.element_bytes / machine.host_bytes_per_s)
    return np.where(candidates.offload, seconds, 0.0)
