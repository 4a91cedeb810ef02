"""Memory of a call on its fullest GPU under every candidate layout, term by term, and what stays between calls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cost_models.candidates import Array, Candidates
from cost_models.engines.machine import Machine
from cost_models.memory.memory_inference import cached_tokens, generation_terms, inference_terms
from cost_models.memory.memory_terms import MemoryTerms
from cost_models.memory.memory_training import training_terms
from cost_models.memory.training_case import TrainingCase
from cost_models.packing import bound_tokens, packed
from cost_models.slots import slots_of
from cost_models.stages import stage_layers
from plans.graph import CallKind
from plans.routes import call_routes, route_token_bytes
from plans.workload import Workload


def call_memory(machine: Machine, workload: Workload, call: str, candidates: Candidates) -> MemoryTerms:
    """Memory of a model call, bytes, shape [candidates].

    A trained model's training call holds the home copy:
    weights, gradients, masters and optimizer stay. Offloaded, only the weights do: masters and optimizer live in host
    memory and are loaded for the call, and the gradient buffers are freed between calls. Its other calls read a copy
    that lives only while they run. A frozen model's weights stay unless offloaded. The CUDA context is not in here: add
    `Machine.context_bytes` once per GPU.
    """
    terms = _without_routes(machine, workload, call, candidates)
    if not call_routes(workload.graph.call(call)):
        return terms
    held = batch_routes(workload, call, candidates)
    return replace(terms, routes=held, kv_cache=terms.kv_cache + cached_routes(machine, workload, call, candidates))


def batch_routes(workload: Workload, call: str, candidates: Candidates) -> Array:
    """Bytes of the routes of all layers of a dp rank's samples (`plans.routes`), of as many iterations as are under way
    where generation runs ahead."""
    tokens = workload.samples / candidates.dp * (workload.prompts.mean + workload.responses.mean - 1.0)
    return tokens * route_token_bytes(workload.spec(call)) * (1.0 + workload.graph.staleness)


def cached_routes(machine: Machine, workload: Workload, call: str, candidates: Candidates) -> Array:
    """Bytes of the routes of the fullest stage's layers that lie beside the KV cache, for a call that generates."""
    if workload.graph.call(call).kind is not CallKind.GENERATE:
        return np.zeros_like(candidates.dp)
    spec, slots = workload.spec(call), np.ceil(slots_of(candidates, workload.samples))
    layers, _ = stage_layers(spec, candidates)
    bytes_of_layer = route_token_bytes(spec) / spec.layers
    return layers * bytes_of_layer * cached_tokens(workload, candidates, slots, machine.habits)


def _without_routes(machine: Machine, workload: Workload, call: str, candidates: Candidates) -> MemoryTerms:
    habits = machine.habits
    spec, kind = workload.spec(call), workload.graph.call(call).kind
    role = workload.graph.call(call).model
    if kind is CallKind.TRAIN_STEP:
        terms = training_terms(spec, training_case(machine, workload, call, candidates), habits)
        state = np.where(candidates.offload, terms.masters + terms.optimizer, 0.0)
        return replace(terms, state_stays=~candidates.offload, host=state)
    if kind is CallKind.GENERATE:
        terms = generation_terms(workload, spec, candidates, habits, machine.constants.prefill_tokens)
    else:
        terms = inference_terms(workload, call, candidates, habits, head_share(machine, workload))
    if role in workload.graph.trainers:
        return replace(terms, weights_stay=np.zeros_like(candidates.offload), is_copy=True)
    return replace(terms, weights_stay=~candidates.offload, host=np.where(candidates.offload, terms.weights, 0.0))


def training_case(machine: Machine, workload: Workload, call: str, candidates: Candidates) -> TrainingCase:
    """The training step of a workload under candidate layouts; micro-batches at the most tokens that they may have."""
    c = packed(workload, call, candidates)
    sequences = bound_tokens(workload, call, c) / workload.tokens
    return TrainingCase(
        dp=c.dp,
        tp=c.tp,
        pp=c.pp,
        cp=c.cp,
        ep=c.ep,
        vpp=c.vpp,
        own_fullest=c.own_fullest,
        own_last=c.own_last,
        sequences=sequences,
        micro_batches=c.micro_batches,
        sequence_parallel=c.sequence_parallel,
        recompute=c.recompute,
        zero=np.where(machine.constants.shards_weights, 3.0, c.shard_optimizer.astype(np.float64)),
        tokens=workload.tokens,
        element=float(workload.element_bytes),
        flash=machine.constants.flash_attention,
        head_share=head_share(machine, workload),
    )


def head_share(machine: Machine, workload: Workload) -> float:
    """Largest share of a micro-batch's tokens that head and loss run on: prompts of mean length, the longest
    responses."""
    if not machine.constants.response_head or not workload.response_tokens:
        return 1.0
    return workload.response_tokens / (workload.prompts.mean + workload.response_tokens)
