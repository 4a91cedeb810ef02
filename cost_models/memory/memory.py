"""Memory of a call on its fullest GPU under every candidate layout, term by term, and what stays between calls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cost_models.candidates import Candidates
from cost_models.memory.memory_inference import generation_terms, inference_terms
from cost_models.memory.memory_terms import MemoryEngine, MemoryTerms, context_bytes, is_cpu, memory_engine
from cost_models.memory.memory_training import training_terms
from cost_models.memory.training_case import TrainingCase
from cost_models.time.engines import DEFAULT_ENGINE
from plans.cluster import ClusterSpec
from plans.graph import CallKind
from plans.workload import Workload

__all__ = ["MemoryTerms", "call_memory", "context_bytes"]


def call_memory(
    workload: Workload,
    call: str,
    cluster: ClusterSpec,
    candidates: Candidates,
    engine: str = DEFAULT_ENGINE,
) -> MemoryTerms:
    """Memory of a model call, bytes, shape [candidates].

    A trained model's training call holds the home copy:
    weights, gradients, masters and optimizer stay. Offloaded, only the weights do: masters and optimizer live in host
    memory and are loaded for the call, and the gradient buffers are freed between calls. Its other calls read a copy
    that lives only while they run. A frozen model's weights stay unless offloaded. The CUDA context is not in here: add
    `context_bytes` once per GPU.
    """
    habits = _habits(cluster, engine)
    spec, kind = workload.spec(call), workload.graph.call(call).kind
    role = workload.graph.call(call).model
    if kind is CallKind.TRAIN_STEP:
        terms = training_terms(spec, training_case(workload, call, candidates, habits), habits)
        state = np.where(candidates.offload, terms.masters + terms.optimizer, 0.0)
        return replace(terms, state_stays=~candidates.offload, host=state)
    if kind is CallKind.GENERATE:
        terms = generation_terms(workload, spec, candidates, habits)
    else:
        terms = inference_terms(workload, spec, candidates, habits)
    if role in workload.graph.trainers:
        return replace(terms, weights_stay=np.zeros_like(candidates.offload), is_copy=True)
    return replace(terms, weights_stay=~candidates.offload, host=np.where(candidates.offload, terms.weights, 0.0))


def training_case(workload: Workload, call: str, candidates: Candidates, engine: MemoryEngine) -> TrainingCase:
    """The training step of a workload under candidate layouts; every sample counts at its longest."""
    c = candidates
    sequences = np.ceil(workload.samples_per_step(call) / (c.dp * c.micro_batches))
    return TrainingCase(
        dp=c.dp,
        tp=c.tp,
        pp=c.pp,
        cp=c.cp,
        ep=c.ep,
        vpp=c.vpp,
        sequences=sequences,
        micro_batches=c.micro_batches,
        sequence_parallel=c.sequence_parallel,
        recompute=c.recompute,
        zero=np.where(engine.shards_weights, 3.0, c.shard_optimizer.astype(np.float64)),
        tokens=workload.tokens,
        element=float(workload.element_bytes),
        flash=engine.flash,
    )


def _habits(cluster: ClusterSpec, engine: str) -> MemoryEngine:
    """The engine on that cluster: CPU devices have no NCCL, no context and an allocator that keeps little."""
    habits = memory_engine(engine)
    return replace(habits, communicator_gib=0.0, context_gib=0.0, reserve=0.05) if is_cpu(cluster) else habits
