"""What a call keeps on one GPU, term by term, and the constants of an engine that the terms need.

All sizes are bytes on the fullest rank, as numpy arrays over candidate layouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.candidates import Array
from cost_models.time.engines import DEFAULT_ENGINE, TABLE_SUFFIX
from plans.cluster import GIB, ClusterSpec
from plans.errors import SpecError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEngine:
    """Memory habits of one training and generation engine.

    fused_pointwise: SwiGLU and rotary embedding are one kernel each, so their intermediate results are not stored.
    flash: fused attention, which stores no scores.
    wgrad_buffers: Transformer Engine's fused gradient accumulation returns one bf16 dummy per distinct weight shape
    and keeps it (TE >= 2, `get_dummy_wgrad`); without it the largest weight gradient is alive for a moment.
    logit_bytes: bytes per token and vocabulary entry at the peak of the loss, beside the logits themselves: the fp32
    softmax (4) and what the loss makes of it. reserve: cached but unused share of the allocator, as a fraction of all
    memory that comes and goes (SimuMax B200 rows, reserved - allocated over transient: 0.19 to 0.30).
    communicator_gib: NCCL buffers per group of a layout. context_gib: CUDA context and libraries.
    forward_logit_bytes: the same in a forward pass that wants log-probs only. sampling_bytes: per sequence and
    vocabulary entry of the rank in decoding: logits (2), their fp32 copy (4), weights (4), hash and noise of the entry
    (8 + 4), scores (4). mask_bytes: per pair of tokens of a prefill with padded prompts: the mask, its inverse and the
    bias that the attention kernel makes of it. shards_weights: training shards weights and gradients over dp (ZeRO-3,
    FSDP); gathered_layers: whole layers that it then holds at once. gathers_keys: context parallelism gathers keys and
    values; otherwise it exchanges heads for tokens (all-to-all). keeps_outputs: the interleaved schedule keeps what a
    stage sent on until its backward pass.
    """

    name: str
    fused_pointwise: bool = True
    flash: bool = True
    wgrad_buffers: bool = False
    logit_bytes: float = 4.0
    forward_logit_bytes: float = 8.0
    reserve: float = 0.25
    communicator_gib: float = 0.3
    context_gib: float = 0.8
    sampling_bytes: float = 26.0
    mask_bytes: float = 0.0
    shards_weights: bool = False
    gathered_layers: int = 2
    gathers_keys: bool = True
    keeps_outputs: bool = False


# logit_bytes 4 is Megatron's vocab_parallel_cross_entropy (the in-place fp32 softmax, which its backward pass reuses);
# 10 is this runtime's backward pass: fp32 probabilities, their gradient, and its copy in the run's precision. Its
# forward pass has scaled logits and their exponentials in fp32. communicator_gib and context_gib: 0.34 to 0.4 GB per
# NCCL communicator set and 0.5 to 0.8 GB per CUDA context on A100 and H100.
_PLAIN_TORCH = MemoryEngine(
    name="megatron", fused_pointwise=False, logit_bytes=10.0, mask_bytes=4.0, keeps_outputs=True
)
MEMORY_ENGINES: Mapping[str, MemoryEngine] = {
    engine.name: engine
    for engine in (
        _PLAIN_TORCH,
        MemoryEngine(name="megatron-te", wgrad_buffers=True, gathers_keys=False),
        MemoryEngine(name="megatron-unfused", flash=False),
        MemoryEngine(name="megatron-deepspeed", flash=False),
        MemoryEngine(name="real"),
        replace(_PLAIN_TORCH, name="fsdp", shards_weights=True),
        replace(_PLAIN_TORCH, name="eager"),
        *(MemoryEngine(name=name) for name in ("cuda-graphs", "native", "trt-llm", "turbomind")),
    )
}


def memory_engine(name: str) -> MemoryEngine:
    """The memory habits of a named engine; those of the default engine where a cost table gives the constants."""
    if name.endswith(TABLE_SUFFIX):
        name = DEFAULT_ENGINE
    if name not in MEMORY_ENGINES:
        raise SpecError(f"unknown engine `{name}`", nearest(name, list(MEMORY_ENGINES)))
    return MEMORY_ENGINES[name]


@dataclass(frozen=True, kw_only=True)
class MemoryTerms:
    """Memory of one call on its fullest rank; every field is an array over candidates, bytes.

    weights: the copy that the call reads. gradients, masters (fp32 weights beside bf16 ones), optimizer (Adam moments):
    training only. activations: stored for the backward pass, or alive in a forward pass. logits: vocabulary logits and
    loss. kv_cache. workspace: temporaries of the fullest moment. communicators: NCCL buffers of the layout's groups.
    reserve: allocator cache that nothing uses. host: host memory per GPU of what is offloaded.

    Flags say which terms stay when the call is not running: `weights_stay` (trained home copy, frozen model that is not
    offloaded), `state_stays` (gradients, masters and optimizer, unless offloaded), `is_copy` (a trained model's weights
    outside its training call: gone when mesh and layout are the training call's own).

    The CUDA context belongs to the process, not to a call: see `context_bytes`.
    """

    weights: Array
    gradients: Array
    masters: Array
    optimizer: Array
    activations: Array
    logits: Array
    kv_cache: Array
    workspace: Array
    communicators: Array
    reserve: Array
    host: Array
    weights_stay: NDArray[np.bool_]
    state_stays: NDArray[np.bool_]
    is_copy: bool = False

    @property
    def resident_bytes(self) -> Array:
        """Alive on those GPUs all the time."""
        weights = np.where(self.weights_stay, self.weights, 0.0)
        return weights + np.where(self.state_stays, self._state, 0.0) + self.communicators

    @property
    def transient_bytes(self) -> Array:
        """Alive while the call runs, beside the resident bytes; includes `copy_bytes`."""
        loaded = np.where(self.weights_stay, 0.0, self.weights)
        loaded = loaded + np.where(self.state_stays, 0.0, self._state)
        return loaded + self.activations + self.logits + self.kv_cache + self.workspace + self.reserve

    @property
    def _state(self) -> Array:
        return self.gradients + self.masters + self.optimizer

    @property
    def copy_bytes(self) -> Array:
        """The part of `transient_bytes` that vanishes when mesh and layout equal the training call's."""
        return self.weights if self.is_copy else np.zeros_like(self.weights)

    @property
    def host_bytes(self) -> Array:
        """Host memory per GPU."""
        return self.host

    @property
    def allocated_bytes(self) -> Array:
        """What `torch.cuda.max_memory_allocated` reports: live tensors, without cache, NCCL and context."""
        return self.resident_bytes - self.communicators + self.transient_bytes - self.reserve

    @property
    def reserved_bytes(self) -> Array:
        """What `torch.cuda.max_memory_reserved` reports: live tensors and the allocator's cache."""
        return self.allocated_bytes + self.reserve

    @property
    def peak_bytes(self) -> Array:
        """Everything while the call runs, without the context of the process."""
        return self.resident_bytes + self.transient_bytes

    def terms(self) -> dict[str, Array]:
        """Device memory by name, in the order of the fields."""
        names = [f.name for f in fields(self) if f.name not in ("host", "weights_stay", "state_stays", "is_copy")]
        return {name: getattr(self, name) for name in names}


def context_bytes(cluster: ClusterSpec, engine: str = DEFAULT_ENGINE) -> float:
    """Memory that CUDA and its libraries take on every GPU once per process; none on CPU devices."""
    return 0.0 if is_cpu(cluster) else memory_engine(engine).context_gib * GIB


def is_cpu(cluster: ClusterSpec) -> bool:
    """Whether the devices are CPU cores."""
    return "cpu" in cluster.gpu.name
