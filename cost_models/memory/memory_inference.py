"""Memory of calls without gradients: one forward pass (log-probs, values, scores) and generation with a KV cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cost_models.candidates import Array, Candidates
from cost_models.engines.habits import MemoryHabits
from cost_models.memory.activations import forward_block_bytes
from cost_models.memory.memory_terms import MemoryTerms
from cost_models.memory.memory_training import HEAD_TEMPORARIES, communicator_bytes, fullest_stage
from cost_models.memory.training_case import StageParts, stage_parts
from cost_models.packing import bound_tokens
from cost_models.slots import decode_moments, slots_of
from cost_models.stages import stage_layers
from plans import kvcache
from plans.model import ModelSpec
from plans.workload import Workload


def weight_bytes(stage: StageParts, candidates: Candidates, element: float) -> Array:
    """Weights of a rank in the run's precision."""
    dense = stage.sharded / candidates.tp + stage.replicated
    return (dense + stage.experts / candidates.ep) * element


def adapter_bytes(stage: StageParts, candidates: Candidates, element: float) -> Array:
    """Adapters of a rank in the run's precision."""
    held: Array = (stage.adapters_cut / candidates.tp + stage.adapters_whole) * element
    return held


def kv_cache_bytes(
    spec: ModelSpec, candidates: Candidates, sequences: Array, tokens: Array | float, element: float
) -> Array:
    """KV cache of a rank: key and value of every layer of the fullest stage, kv_heads / tp heads (or latent attention's
    one vector), `tokens` of each of the replica's `sequences`."""
    layers, _ = stage_layers(spec, candidates)
    width = spec.latent_width or spec.key_value_width / candidates.tp
    per_token = layers * width * element
    cache: Array = per_token * tokens * sequences
    return cache


def cached_tokens(workload: Workload, candidates: Candidates, slots: Array, habits: MemoryHabits) -> Array:
    """Tokens that the KV cache of a replica has room for: its slots at the longest, or blocks as the runtime counts
    them for each group in flight, with one that free slots write to. fp32 has no kernel for a cache in blocks. A cache
    that grows has room for what the sequences hold at their fullest moment."""
    if habits.grows and not workload.responses.full:
        rows, prompts = workload.samples / candidates.dp, workload.prompts.mean
        held = [
            moment.slots * np.minimum(moment.alive, 1.0) * (prompts + moment.position)
            for moment in decode_moments(workload.responses, rows, slots, first=1.0, burst=1.0)
        ]
        fullest: Array = np.maximum.reduce(held)
        return fullest
    block = habits.block_tokens if workload.element_bytes < 4 else 0
    sizes = workload.prompt_tokens, max(workload.response_tokens, 1), workload.group_size
    tokens: Array = kvcache.cached_tokens(slots, np.minimum(candidates.groups, slots), *sizes, block)  # type: ignore
    return tokens


def inference_terms(
    workload: Workload, call: str, candidates: Candidates, habits: MemoryHabits, head_share: float = 1.0
) -> MemoryTerms:
    """Memory of one forward pass over the batch in micro-batches of real tokens; log-probs need the logits of a
    `head_share` of them."""
    element = float(workload.element_bytes)
    tokens = bound_tokens(workload, call, candidates) / candidates.cp
    block = forward_block_bytes(workload.spec(call), element, candidates.tp, fused_pointwise=habits.fused_pointwise)
    activations = block * tokens
    entries = tokens * head_share / candidates.tp
    if habits.head_elements:
        entries = np.minimum(entries, habits.head_elements / float(workload.spec(call).padded_vocab))
        logits = (element + habits.forward_logit_bytes + HEAD_TEMPORARIES) * entries
    else:
        logits = (element + habits.forward_logit_bytes) * entries
    return _fullest(workload.spec(call), candidates, habits, element, activations, logits)


def generation_terms(
    workload: Workload, spec: ModelSpec, candidates: Candidates, habits: MemoryHabits, prefill_tokens: float = 0.0
) -> MemoryTerms:
    """Memory of generation: KV cache of all slots at the longest, prefill of one group of sequences (or of one pack of
    prompts, a part of it where replicas share experts) at once, logits of one token per sequence of a group.
    """
    element, c = float(workload.element_bytes), candidates
    slots = np.ceil(slots_of(c, workload.samples))
    cache = kv_cache_bytes(spec, c, np.ones_like(slots), cached_tokens(workload, c, slots, habits), element)
    group = np.ceil(slots / c.groups)
    block = forward_block_bytes(spec, element, candidates.tp, fused_pointwise=habits.fused_pointwise)
    prefill, joined = group * workload.prompt_tokens, c.joined_replicas
    if prefill_tokens:
        prefill = np.minimum(prefill, np.maximum(prefill_tokens / joined, workload.prompt_tokens))
    activations = block * prefill
    logits = habits.sampling_bytes / candidates.tp * group
    terms = _fullest(spec, candidates, habits, element, activations, logits)
    masks = habits.mask_bytes * group * float(workload.prompt_tokens) ** 2
    laid_out = habits.laid_out * (terms.weights + terms.base) if element == 4 else 0.0
    # The tokens of all replicas that share experts, and what the experts say to them.
    gathered = np.where(joined > 1, 2.0 * element * spec.hidden * joined * np.maximum(prefill, group), 0.0)
    return replace(terms, kv_cache=cache, workspace=masks + laid_out + gathered)


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
        weights, base = weight_bytes(stage, candidates, element), none
        if stage.frozen:
            weights, base = adapter_bytes(stage, candidates, element), weights
        return MemoryTerms(
            weights=weights,
            base=base,
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
