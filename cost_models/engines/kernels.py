"""What an engine's kernels and collectives take, by shape: the interface that operations are costed through.

`AnalyticKernels` answers with formulas, `MeasuredKernels` with a kernel table where it has the shape, and
`RecordingKernels` says besides where each answer came from.
"""

from __future__ import annotations

from typing import Protocol

from cost_models.candidates import Array, Flags


class Kernels(Protocol):
    """Seconds of single operations on one GPU, and of collectives; arrays [candidates] or numbers.

    Collectives: `size` ranks of a group, `per_node` of them on each node; `message` is the whole vector in bytes (the
    output of an all-gather, the input of a reduce-scatter), as in nccl-tests.
    """

    def gemm(self, m: Array, n: Array | float, k: Array | float) -> Array:
        """C[m, n] = A[m, k] B[k, n]."""
        ...

    def gemm_and_backward(self, m: Array, n: Array | float, k: Array | float) -> tuple[Array, Array]:
        """A product, and its dgrad, C[m, k], and wgrad, C[k, n], together."""
        ...

    def attention(self, head_dim: int, tokens: Array, length: Array, heads: Array) -> Array:
        """Causal fused attention, forward, of `heads` heads on `tokens` tokens in sequences of `length`."""
        ...

    def cache_read(self, head_dim: int, rows: Array, length: Array, kv_heads: Array) -> Array:
        """Attention of one new token of `rows` sequences to `length` cached ones: it reads their keys and values."""
        ...

    def all_reduce(self, message: Array, size: Array, per_node: Array) -> Array:
        """Sum `message` bytes over a group; every rank ends with the sum."""
        ...

    def all_gather(self, message: Array, size: Array, per_node: Array) -> Array:
        """Gather `message` bytes in all, message / size from each rank."""
        ...

    def reduce_scatter(self, message: Array, size: Array, per_node: Array) -> Array:
        """Sum `message` bytes and leave message / size on each rank."""
        ...

    def scattered_all_reduce(self, message: Array, size: Array, per_node: Array) -> Array:
        """An all-reduce cut into a reduce-scatter and an all-gather, as sequence parallelism has it."""
        ...

    def all_to_all(self, message: Array, size: Array, per_node: Array) -> Array:
        """Every rank sends `message` bytes in equal parts to the ranks of its group."""
        ...

    def send(self, message: Array, across: Flags) -> Array:
        """Send `message` bytes to one rank, over the network where `across`."""
        ...
