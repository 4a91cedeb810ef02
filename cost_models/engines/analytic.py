"""Kernels from formulas: rooflines with the engine's efficiencies, and the latency-bandwidth law of collectives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cost_models.candidates import Array, Flags
from cost_models.engines import collectives
from cost_models.engines.rates import Rates


@dataclass(frozen=True, eq=False)
class AnalyticKernels:
    """See `Kernels` for what each function answers."""

    rates: Rates

    def gemm(self, m: Array, n: Array | float, k: Array | float) -> Array:
        """hypot(compute, memory): compute = 2 m n k / (peak x efficiency) x (1 + e/m)(1 + e/n)(1 + e/k) with e the half
        extent, memory = (mk + kn + mn) bytes / bandwidth. The hypotenuse follows the measured passage from weight
        streaming to compute within 4 % (aiconfigurator's A100 GEMM table: m = 64, 128, 256, 512 over n, k >= 4096).
        """
        rates, constants = self.rates, self.rates.constants
        extent = constants.gemm_half_extent
        padded = (m + extent) * (n + extent) * (k + extent)
        compute = padded * (2.0 / (rates.peak_flops * constants.gemm_efficiency))
        memory = (m * k + n * k + m * n) * (rates.element_bytes / rates.memory_bytes_per_s)
        seconds: Array = np.sqrt(compute * compute + memory * memory)
        return seconds

    def gemm_and_backward(self, m: Array, n: Array | float, k: Array | float) -> tuple[Array, Array]:
        """The backward pass is a multiple of the forward."""
        forward = self.gemm(m, n, k)
        return forward, forward * self.rates.constants.backward_gemm_ratio

    def attention(self, head_dim: int, tokens: Array, length: Array, heads: Array) -> Array:
        """4 x tokens x length x heads x head_dim FLOPs, halved by causality (FlashAttention-2, section 3.1)."""
        flops = 2.0 * tokens * length * (heads * head_dim)
        return flops / (self.rates.peak_flops * self.rates.constants.attention_efficiency)

    def cache_read(self, head_dim: int, rows: Array, length: Array, kv_heads: Array) -> Array:
        """rows x length x 2 x kv_heads x head_dim elements at the cache's share of the memory bandwidth."""
        rates = self.rates
        bandwidth = rates.vendor_memory_bytes_per_s * rates.constants.kv_efficiency
        seconds: Array = rows * (2.0 * head_dim * kv_heads) * (length * rates.element_bytes / bandwidth)
        return seconds

    def all_reduce(self, message: Array, size: Array, per_node: Array) -> Array:
        """`collectives.all_reduce`."""
        return collectives.all_reduce(self.rates, message, size, per_node)

    def all_gather(self, message: Array, size: Array, per_node: Array) -> Array:
        """`collectives.all_gather`."""
        return collectives.all_gather(self.rates, message, size, per_node)

    def reduce_scatter(self, message: Array, size: Array, per_node: Array) -> Array:
        """`collectives.reduce_scatter`."""
        return collectives.reduce_scatter(self.rates, message, size, per_node)

    def scattered_all_reduce(self, message: Array, size: Array, per_node: Array) -> Array:
        """`collectives.scattered_all_reduce`."""
        return collectives.scattered_all_reduce(self.rates, message, size, per_node)

    def all_to_all(self, message: Array, size: Array, per_node: Array) -> Array:
        """The longer of what stays inside the node, at an all-gather's speed, and of what leaves it."""
        inside = self.all_gather(message, size, size)
        leaving = collectives.leaving_node(self.rates, message, size, per_node)
        return np.where(size > 1, np.maximum(inside, leaving), 0.0)

    def send(self, message: Array, across: Flags) -> Array:
        """`collectives.point_to_point`."""
        return collectives.point_to_point(self.rates, message, across)
