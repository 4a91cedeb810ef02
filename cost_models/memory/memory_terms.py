"""What a call keeps on one GPU, term by term.

All sizes are bytes on the fullest rank, as numpy arrays over candidate layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from cost_models.candidates import Array
from plans.reallocation import buffer_bytes


@dataclass(frozen=True, kw_only=True)
class MemoryTerms:
    """Memory of one call on its fullest rank; every field is an array over candidates, bytes.

    weights: the copy that the call reads. base: frozen weights beside adapters, which are then the copy; it stays all
    the time, and here counts for each call, though copies may share it (`Program.base_owner`). gradients, masters (fp32
    weights beside bf16 ones), optimizer (Adam moments): training only. activations: stored for the backward pass, or
    alive in a forward pass. logits: vocabulary logits and loss. kv_cache. workspace: temporaries of the fullest moment.
    communicators: NCCL buffers of the layout's groups. reserve: allocator cache that nothing uses. host: host memory
    per GPU of what is offloaded. routes: the experts of the tokens of an iteration, from their generation to the
    training that replays them; they count as if they always stayed.

    Flags say which terms stay when the call is not running: `weights_stay` (trained home copy, frozen model that is not
    offloaded), `state_stays` (gradients, masters and optimizer, unless offloaded), `is_copy` (a trained model's weights
    outside its training call: gone when mesh and layout are the training call's own).

    The CUDA context belongs to the process, not to a call: see `Machine.context_bytes`.
    """

    weights: Array
    base: Array
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
    routes: Array = field(default_factory=lambda: np.zeros(1))
    is_copy: bool = False

    @property
    def resident_bytes(self) -> Array:
        """Alive on those GPUs all the time."""
        weights = self.base + np.where(self.weights_stay, self.weights, 0.0)
        return weights + np.where(self.state_stays, self._state, 0.0) + self.communicators + self.routes

    @property
    def transient_bytes(self) -> Array:
        """Alive while the call runs, or while its copy is made where that takes more, beside the resident bytes;
        includes `copy_bytes`."""
        loaded = np.where(self.weights_stay, 0.0, self.weights)
        return loaded + np.where(self.state_stays, 0.0, self._state) + self._used + self._buffers_beyond

    @property
    def _used(self) -> Array:
        return self.activations + self.logits + self.kv_cache + self.workspace + self.reserve

    @property
    def _buffers_beyond(self) -> Array:
        """What the buffers of a reallocation exceed the memory by that the call itself needs later."""
        if not self.is_copy:
            return np.zeros_like(self.weights)
        beyond: Array = np.maximum(buffer_bytes(self.weights) - self._used, 0.0)
        return beyond

    @property
    def _state(self) -> Array:
        return self.gradients + self.masters + self.optimizer

    @property
    def copy_bytes(self) -> Array:
        """The part of `transient_bytes` that vanishes when mesh and layout equal the training call's."""
        return self.weights + self._buffers_beyond if self.is_copy else np.zeros_like(self.weights)

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
        """Device memory by name, in the order of the fields; base and routes where there are some."""
        none = [name for name in ("base", "routes") if not getattr(self, name).any()]
        apart = ("host", "weights_stay", "state_stays", "is_copy", *none)
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
