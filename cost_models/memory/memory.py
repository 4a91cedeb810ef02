"""Memory of a call on its fullest GPU under every candidate layout, term by term, and what stays between calls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cost_models.candidates import Candidates
from cost_models.engines.machine import Machine
from cost_models.memory.memory_inference import generation_terms, inference_terms
from cost_models.memory.memory_terms import MemoryTerms
from cost_models.memory.memory_training import training_terms
from cost_models.memory.training_case import TrainingCase
from cost_models.packing import bound_tokens, packed
from plans.graph import CallKind
from plans.workload import Workload


def call_memory(machine: Machine, workload: Workload, call: str, candidates: Candidates) -> MemoryTerms:
    """Memory of a model call, bytes, shape [candidates].

    A trained model's training call holds the home copy:
    weights, gradients, masters and optimizer stay. Offloaded, only the weights do: masters and optimizer live in host
    memory and are loaded for the call, and the gradient buffers are freed between calls. Its other calls read a copy
    that lives only while they run. A frozen model's weights stay unless offloaded. The CUDA context is not in here: add
    `Machine.context_bytes` once per GPU.
    """
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
