"""Memory of calls without gradients: one forward pass (log-probs, values, scores) and generation with a KV cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cost_models.candidates import Array, Candidates
from cost_models.engines.habits import MemoryHabits
from cost_models.memory.activations import forward_block_bytes
from cost_models.memory.memory_terms import MemoryTerms
from cost_models.memory.memory_training import communicator_bytes, fullest_stage
from cost_models.memory.training_case import StageParts, stage_parts
from cost_models.stages import stage_layers
from plans.model import ModelSpec
from plans.workload import Workload


def weight_bytes(stage: StageParts, candidates: Candidates, element: float) -> Array:
    """Weights of a rank in the run's precision."""
    dense = stage.sharded / candidates.tp + stage.replicated
    return (dense + stage.experts / candidates.ep) * element


def kv_cache_bytes(spec: ModelSpec, candidates: Candidates, sequences: Array, tokens: int, element: float) -> Array:
    """KV cache of a rank: key and value of every layer of the fullest stage, kv_heads / tp heads, all sequences of the
    replica."""
    layers, _ = stage_layers(spec, candidates)
    per_token = 2.0 * layers * spec.kv_heads / candidates.tp * spec.head_dim * element
    cache: Array = per_token * tokens * sequences
    return cache


def inference_terms(workload: Workload, spec: ModelSpec, candidates: Candidates, habits: MemoryHabits) -> MemoryTerms:
    """Memory of one forward pass over the batch in micro-batches; log-probs need the logits of every token."""
    element = float(workload.element_bytes)
    sequences = np.ceil(workload.samples / (candidates.dp * candidates.micro_batches))
    tokens = sequences * workload.tokens / candidates.cp
    activations = forward_block_bytes(spec, element, candidates.tp, fused_pointwise=habits.fused_pointwise) * tokens
    logits = (element + habits.forward_logit_bytes) / candidates.tp * tokens
    return _fullest(spec, candidates, habits, element, activations, logits)


def generation_terms(workload: Workload, spec: ModelSpec, candidates: Candidates, habits: MemoryHabits) -> MemoryTerms:
    """Memory of generation: KV cache at full length, prefill of one group of sequences at once with its attention mask,
    logits of one token per sequence of a group.
    """
    element = float(workload.element_bytes)
    sequences = np.ceil(workload.samples / (candidates.dp * candidates.parts(workload.samples)))
    cache = kv_cache_bytes(spec, candidates, sequences, workload.tokens, element)
    group = np.ceil(sequences / candidates.groups)
    block = forward_block_bytes(spec, element, candidates.tp, fused_pointwise=habits.fused_pointwise)
    activations = block * group * workload.prompt_tokens
    logits = habits.sampling_bytes / candidates.tp * group
    terms = _fullest(spec, candidates, habits, element, activations, logits)
    return replace(terms, kv_cache=cache, workspace=habits.mask_bytes * group * float(workload.prompt_tokens) ** 2)


def _fullest(
    spec: ModelSpec,
    candidates: Candidates,
    habits: MemoryHabits,
    element: float,
    activations: Array,
    bytes_per_logit: Array,
) -> MemoryTerms:
    """The fuller of first and last stage."""
    none = np.zeros_like(candidates.tp)

    def terms(stage: StageParts) -> MemoryTerms:
        logits = stage.vocabulary * bytes_per_logit
        return MemoryTerms(
            weights=weight_bytes(stage, candidates, element),
            gradients=none,
            masters=none,
            optimizer=none,
            activations=activations,
            logits=logits,
            kv_cache=none,
            workspace=none,
            communicators=communicator_bytes(habits, candidates.tp, candidates.pp, candidates.cp),
            reserve=habits.reserve * (activations + logits),
            host=none,
            weights_stay=np.ones_like(none, dtype=np.bool_),
            state_stays=np.ones_like(none, dtype=np.bool_),
        )

    own = {"own_fullest": candidates.own_fullest, "own_last": candidates.own_last}
    return fullest_stage(*(terms(stage_parts(spec, candidates.pp, last=end, **own)) for end in (False, True)))
