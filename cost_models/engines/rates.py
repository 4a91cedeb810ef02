"""Rates: what the constants of an engine make of a cluster's vendor figures, in bytes and FLOPs per second."""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.engines.constants import Constants
from plans.cluster import ClusterSpec
from plans.workload import DTYPE_BYTES


@dataclass(frozen=True, eq=False)
class Rates:
    """Speeds of one GPU, its links and its share of the network under an engine in a precision."""

    cluster: ClusterSpec
    constants: Constants
    dtype: str

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return DTYPE_BYTES[self.dtype]

    @property
    def peak_flops(self) -> float:
        """Vendor peak in the precision, FLOP/s."""
        gpu = self.cluster.gpu
        return 1e12 * (gpu.fp32_tflops if self.dtype == "fp32" else gpu.bf16_tflops)

    @property
    def vendor_memory_bytes_per_s(self) -> float:
        """Vendor peak of the memory bandwidth."""
        return 1e9 * self.cluster.gpu.hbm_gbps

    @property
    def memory_bytes_per_s(self) -> float:
        """Memory bandwidth that streaming kernels reach."""
        return self.vendor_memory_bytes_per_s * self.constants.memory_efficiency

    @property
    def link_bytes_per_s(self) -> float:
        """Reached bandwidth of one GPU to the others of its node, one direction."""
        return 1e9 * self.cluster.gpu.link_gbps * self.constants.link_efficiency

    @property
    def link_send_bytes_per_s(self) -> float:
        """Reached bandwidth of one GPU's send to one other of its node."""
        return self.link_bytes_per_s * self.constants.send_efficiency

    @property
    def network_bytes_per_s(self) -> float:
        """Reached network bandwidth, one direction, as one GPU's share of its node's cards."""
        return 1e9 * self.cluster.inter_node_gbps * self.constants.network_efficiency

    @property
    def send_bytes_per_s(self) -> float:
        """Reached network bandwidth of one GPU's send to one other."""
        return 1e9 * self.cluster.inter_node_gbps * self.constants.pipeline_efficiency

    @property
    def host_bytes_per_s(self) -> float:
        """Reached bandwidth between one GPU and host memory."""
        return 1e9 * self.cluster.gpu.pcie_gbps * self.constants.offload_efficiency
