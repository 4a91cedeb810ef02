"""A machine of round numbers: one byte or one FLOP takes a nanosecond, and what a test does not ask for takes nothing.

Seconds of a call are then the bytes that its busiest rank sends, or the FLOPs that it does, times 1e-9: they can be
reckoned by hand from the papers. Nothing here calls the kernels of the product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cost_models.candidates import Array, Candidates, Flags
from cost_models.engines.constants import Constants
from cost_models.engines.habits import MemoryHabits
from cost_models.engines.machine import Machine
from plans.cluster import ClusterSpec, DeviceMesh, GpuSpec
from plans.model import ModelSpec
from plans.strategy import ParallelStrategy

NANO = 1e-9
FAR = 16.0
"""How much longer a byte takes between nodes than inside one: a group in the wrong place shows."""
FREE = 1e12
"""An efficiency so high that nothing takes time."""
DENSE = ModelSpec(
    name="dense", layers=24, hidden=1536, heads=12, kv_heads=4, head_dim=128, ffn=4096, vocab=32_000, max_context=4096
)
EXPERTS = replace(DENSE, name="experts", ffn=640, experts=16, experts_per_token=4)

NOTHING = Constants(
    gemm_efficiency=1.0, gemm_half_extent=0.0, backward_gemm_ratio=2.0, attention_efficiency=1.0,
    attention_backward_ratio=2.5, memory_efficiency=1.0, kv_efficiency=1.0, hidden_passes=0.0, ffn_passes=0.0,
    softmax_passes=0.0, loss_passes=0.0, host_forward_layer_s=0.0, host_backward_layer_s=0.0, host_decode_layer_s=0.0,
    layer_gap_s=0.0, decode_layer_s=0.0, decode_step_s=0.0, micro_batch_s=0.0, step_s=0.0, call_s=0.0,
    link_efficiency=1.0, link_latency_s=0.0, link_hop_s=0.0, link_half_bytes=0.0, network_efficiency=1.0,
    network_latency_s=0.0, network_half_bytes=0.0, tensor_overlap=0.0, data_overlap=0.0, gather_overlap=0.0,
    pipeline_overlap=0.0, pipeline_efficiency=1.0, gradient_bytes=4.0, message_s=0.0, optimizer_bytes=0.0,
    accumulate_bytes=0.0, offload_efficiency=1.0, splits_sends=False, decode_row_s=0.0, sampling_bytes=0.0,
)  # fmt: skip
"""Full efficiency, no latency, no overlap, no passes over memory."""


@dataclass(frozen=True, eq=False)
class TextbookKernels:
    """Ring algorithms by bytes, products by FLOPs; `flop`, `byte` and `cached` are seconds of one each.

    See `Kernels` for what each function answers. A ring sends (n - 1) / n of the message from every rank, an all-reduce
    twice that; it goes at the pace of the network where the group is not on one node.
    """

    flop: float = 0.0
    byte: float = 0.0
    cached: float = 0.0

    def _ring(self, message: Array, size: Array, per_node: Array) -> Array:
        return np.where(size > per_node, FAR, 1.0) * self.byte * message * (size - 1) / size

    def gemm(self, m: Array, n: Array | float, k: Array | float) -> Array:
        return 2.0 * m * n * k * self.flop

    def gemm_and_backward(self, m: Array, n: Array | float, k: Array | float) -> tuple[Array, Array]:
        return self.gemm(m, n, k), 2.0 * self.gemm(m, n, k)

    def attention(self, head_dim: int, tokens: Array, length: Array, heads: Array) -> Array:
        return 2.0 * tokens * length * heads * head_dim * self.flop

    def cache_read(self, head_dim: int, rows: Array, length: Array, kv_heads: Array) -> Array:
        return rows * length * kv_heads * (2.0 * head_dim * 2.0) * self.cached

    def all_reduce(self, message: Array, size: Array, per_node: Array) -> Array:
        return 2.0 * self._ring(message, size, per_node)

    def all_gather(self, message: Array, size: Array, per_node: Array) -> Array:
        return self._ring(message, size, per_node)

    def reduce_scatter(self, message: Array, size: Array, per_node: Array) -> Array:
        return self._ring(message, size, per_node)

    def scattered_all_reduce(self, message: Array, size: Array, per_node: Array) -> Array:
        return self.reduce_scatter(message, size, per_node) + self.all_gather(message, size, per_node)

    def all_to_all(self, message: Array, size: Array, per_node: Array) -> Array:
        return self._ring(message, size, per_node)

    def send(self, message: Array, across: Flags) -> Array:
        return np.where(across, FAR, 1.0) * self.byte * message


def machine(
    kernels: TextbookKernels, *, gpus: int = 64, dtype: str = "bf16", habits: MemoryHabits | None = None, **changed: Any
) -> Machine:
    """Nodes of eight; memory, links and the bus to the host move a byte in a nanosecond. `changed`: constants."""
    gpu = GpuSpec(name="round", memory_gib=80, bf16_tflops=1, fp32_tflops=1, hbm_gbps=1, link_gbps=1, pcie_gbps=1)
    cluster = ClusterSpec(nodes=max(gpus // 8, 1), gpus_per_node=8, gpu=gpu, inter_node_gbps=1)
    return Machine(cluster, replace(NOTHING, **changed), dtype, kernels, habits or MemoryHabits())


def network(**changed: Any) -> Machine:
    """Only bytes between GPUs take time."""
    return machine(TextbookKernels(byte=NANO), **({"memory_efficiency": FREE} | changed))


def compute(**changed: Any) -> Machine:
    """Only products and attention take time, a nanosecond a FLOP."""
    return machine(TextbookKernels(flop=NANO), **({"memory_efficiency": FREE} | changed))


def memory(**changed: Any) -> Machine:
    """Only passes over memory take time, those of the constants that are changed, and reading the KV cache."""
    return machine(TextbookKernels(cached=NANO), **changed)


def layout(**settings: Any) -> Candidates:
    """One strategy on as many GPUs as it needs, whole nodes of eight where it needs more than one."""
    strategy = ParallelStrategy(**settings)
    nodes = max(strategy.size // 8, 1)
    mesh = DeviceMesh(first_node=0, nodes=nodes, first_gpu=0, gpus=min(strategy.size, 8))
    assert mesh.size == strategy.size, f"{strategy.size} GPUs are no mesh of nodes of eight"
    return Candidates.of([(mesh, strategy)])


def nanoseconds(seconds: Array) -> float:
    """Bytes or FLOPs of a textbook machine."""
    (only,) = np.broadcast_to(seconds, (1,))
    return float(only) / NANO
