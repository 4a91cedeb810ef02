"""Machine: a cluster's devices as an engine uses them, in bytes and FLOPs per second."""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.tables.kernels import kernel_table
from cost_models.tables.tables import CostTable
from cost_models.time.engines import Engine
from plans.cluster import ClusterSpec
from plans.workload import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class Machine:
    """What the operations and collectives are costed on."""

    cluster: ClusterSpec
    engine: Engine
    dtype: str = "bf16"

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return DTYPE_BYTES[self.dtype]

    @property
    def kernels(self) -> CostTable | None:
        """The GPU's measured kernels, where the engine goes by them: they are of two-byte precisions."""
        return kernel_table(self.cluster.gpu.name) if self.engine.measured_kernels and self.dtype != "fp32" else None

    @property
    def peak_flops(self) -> float:
        """Vendor peak in the precision, FLOP/s."""
        gpu = self.cluster.gpu
        return 1e12 * (gpu.fp32_tflops if self.dtype == "fp32" else gpu.bf16_tflops)

    @property
    def memory_bytes_per_s(self) -> float:
        """Reached HBM bandwidth."""
        return 1e9 * self.cluster.gpu.hbm_gbps * self.engine.memory_efficiency

    @property
    def link_bytes_per_s(self) -> float:
        """Reached bandwidth of one GPU to the others of its node, one direction."""
        return 1e9 * self.cluster.gpu.link_gbps * self.engine.link_efficiency

    @property
    def link_send_bytes_per_s(self) -> float:
        """Reached bandwidth of one GPU's send to one other of its node."""
        return self.link_bytes_per_s * self.engine.send_efficiency

    @property
    def network_bytes_per_s(self) -> float:
        """Reached network bandwidth, one direction, as one GPU's share of its node's cards."""
        return 1e9 * self.cluster.inter_node_gbps * self.engine.network_efficiency

    @property
    def send_bytes_per_s(self) -> float:
        """Reached network bandwidth of one GPU's send to one other."""
        return 1e9 * self.cluster.inter_node_gbps * self.engine.pipeline_efficiency

    @property
    def host_bytes_per_s(self) -> float:
        """Reached bandwidth between one GPU and host memory."""
        return 1e9 * self.cluster.gpu.pcie_gbps * self.engine.offload_efficiency
