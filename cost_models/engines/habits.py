"""Memory habits: what an engine keeps on a GPU beside what the arithmetic needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from plans.cluster import ClusterSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryHabits:
    """Memory habits of one training and generation engine; whether attention is fused and weights are sharded over dp
    is said by its `Constants`.

    fused_pointwise: norms and SwiGLU keep their input and output alone, no intermediate results. fused_rotary: so does
    the rotary embedding, which otherwise keeps queries and keys on both sides.
    wgrad_buffers: Transformer Engine's fused gradient accumulation returns one bf16 dummy per distinct weight shape
    and keeps it (TE >= 2, `get_dummy_wgrad`); without it the largest weight gradient is alive for a moment.
    logit_bytes: bytes per token and vocabulary entry at the peak of the loss, beside the logits themselves: the fp32
    softmax (4) and what the loss makes of it. 4 is Megatron's vocab_parallel_cross_entropy (the in-place fp32 softmax,
    which its backward pass reuses); 10 is a plain one: fp32 probabilities, their gradient, and its copy in the run's
    precision; 0 is this runtime's, which turns the logits into their gradient in place.
    forward_logit_bytes: the same in a forward pass that wants log-probs only: scaled logits and their exponentials in
    fp32. sampling_bytes: per sequence and vocabulary entry of the rank in decoding: logits (2), their fp32 copy (4),
    weights (4), hash and noise of the entry (8 + 4), scores (4). mask_bytes: per pair of tokens of a prefill with
    padded prompts: the mask, its inverse and the bias that the attention kernel makes of it.
    head_elements: entries of logits that fp32 temporaries (two of them) are made for at a time, and that exist at a
    time in a pass that only scores; 0: all.
    kept_logits: entries of a micro-batch's logits that are kept for its backward pass; those beyond are computed once
    more there, `head_elements` at a time; 0: all are kept.
    block_tokens: tokens of a block of the KV cache, as `plans.kvcache` counts them; 0: a slot holds one sequence at its
    longest.
    grows: blocks of a cache are taken as responses grow (vLLM), so that it needs what sequences hold at a time.
    reserve: cached but unused share of the allocator, as a fraction of all memory that comes and goes (SimuMax B200
    rows, reserved - allocated over transient: 0.19 to 0.30). communicator_gib: NCCL buffers per group of a layout, 0.34
    to 0.4 GB on A100 and H100. context_gib: CUDA context and libraries, 0.5 to 0.8 GB there.
    gathered_layers: whole layers that sharded weights hold at once. gathers_keys: context parallelism gathers keys and
    values; otherwise it exchanges heads for tokens (all-to-all). keeps_outputs: the interleaved schedule keeps what a
    stage sent on until its backward pass. laid_out: copies of fp32 weights that generation lays out for its products.
    """

    fused_pointwise: bool = True
    fused_rotary: bool = True
    wgrad_buffers: bool = False
    logit_bytes: float = 4.0
    forward_logit_bytes: float = 8.0
    reserve: float = 0.25
    communicator_gib: float = 0.3
    context_gib: float = 0.8
    sampling_bytes: float = 26.0
    mask_bytes: float = 0.0
    head_elements: int = 0
    kept_logits: int = 0
    block_tokens: int = 0
    grows: bool = False
    gathered_layers: int = 2
    gathers_keys: bool = True
    keeps_outputs: bool = False
    laid_out: int = 0


def habits_on(cluster: ClusterSpec, habits: MemoryHabits) -> MemoryHabits:
    """The habits on that cluster: CPU devices have no NCCL, no context, an allocator that keeps little, no kernel
    for a cache in blocks, and products on weights that are laid out for them (`runtime.generation.products`)."""
    if "cpu" not in cluster.gpu.name:
        return habits
    return replace(habits, communicator_gib=0.0, context_gib=0.0, reserve=0.05, block_tokens=0, laid_out=1)
