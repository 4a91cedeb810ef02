"""ClusterSpec and DeviceMesh: which devices exist, how fast they are linked, and the rectangles calls run on."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import cached_property

from plans.errors import SpecError
from plans.problems import shortened

MIB, GIB = 2**20, 2**30
MOST_GPUS = 65_536
SLOWEST, FASTEST = 1e-6, 1e6
"""What a memory size, a speed or a bandwidth can be, in its own unit; outside, the sums lose their meaning."""
EXAMPLES = {"memory_gib": 80, "host_memory_gib": 1024, "bf16_tflops": 989, "hbm_gbps": 3350, "pcie_gbps": 64}


def check_amount(owner: str, name: str, value: float) -> None:
    """Raise unless a memory size (GiB), a speed (TFLOP/s) or a bandwidth (GB/s) is one that hardware can have."""
    if not SLOWEST <= value <= FASTEST:
        message = f"{owner}: {name} is {shortened(value)}; it must be a number from {SLOWEST:.6f} to {FASTEST:,.0f}"
        raise SpecError(message, f"{name} {EXAMPLES.get(name, 100)}, for example")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One kind of device. Peaks are dense vendor figures; bandwidths are per direction.

    bf16_tflops, fp32_tflops: matrix throughput. hbm_gbps: memory bandwidth, GB/s. link_gbps: per GPU inside a node
    (NVLink or PCIe), GB/s. pcie_gbps: to host memory, GB/s.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    hbm_gbps: float
    link_gbps: float
    pcie_gbps: float

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name != "name":
                check_amount(f"gpu `{self.name}`", item.name, getattr(self, item.name))


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """Nodes of equal GPUs. `inter_node_gbps` is network bandwidth per GPU and direction, GB/s."""

    nodes: int
    gpus_per_node: int
    gpu: GpuSpec
    inter_node_gbps: float
    host_memory_gib: float = 1024.0

    def __post_init__(self) -> None:
        for field in ("nodes", "gpus_per_node"):
            if getattr(self, field) < 1:
                raise SpecError(f"cluster: {field} is {shortened(getattr(self, field))}; it must be at least 1", "1")
        if self.size > MOST_GPUS:
            raise SpecError(
                f"cluster: {shortened(self.nodes)} nodes of {shortened(self.gpus_per_node)} GPUs;"
                f" a cluster can have at most {MOST_GPUS:,} GPUs",
                f"nodes {max(1, MOST_GPUS // self.gpus_per_node)} or less",
            )
        for field in ("inter_node_gbps", "host_memory_gib"):
            check_amount("cluster", field, getattr(self, field))

    @property
    def size(self) -> int:
        """All GPUs."""
        return self.nodes * self.gpus_per_node

    @property
    def gpu_memory_bytes(self) -> int:
        """Memory of one GPU, bytes."""
        return int(self.gpu.memory_gib * GIB)

    @cached_property
    def whole(self) -> DeviceMesh:
        """The mesh of every GPU."""
        return DeviceMesh(first_node=0, nodes=self.nodes, first_gpu=0, gpus=self.gpus_per_node)


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class DeviceMesh:
    """A rectangle of the cluster: `nodes` nodes from `first_node`, `gpus` GPUs of each from `first_gpu`.

    Legal meshes are whole nodes, or an aligned power-of-two part of one node (`fits` holds the rule).
    """

    first_node: int
    nodes: int
    first_gpu: int
    gpus: int

    @property
    def size(self) -> int:
        """GPUs in the mesh."""
        return self.nodes * self.gpus

    def ranks(self, cluster: ClusterSpec) -> range:
        """Global ranks, contiguous because a part of a node never spans nodes."""
        first = self.first_node * cluster.gpus_per_node + self.first_gpu
        return range(first, first + self.size)

    def overlaps(self, other: DeviceMesh) -> bool:
        """Whether some GPU lies in both."""
        return (
            self.first_node < other.first_node + other.nodes
            and other.first_node < self.first_node + self.nodes
            and self.first_gpu < other.first_gpu + other.gpus
            and other.first_gpu < self.first_gpu + self.gpus
        )

    def text(self, cluster: ClusterSpec) -> str:
        """The mesh as the plan file writes it: `nodes 0-3`, `node 8`, `node 8 gpus 0-3`, `node 8 gpu 1`."""
        nodes = (
            f"node {self.first_node}"
            if self.nodes == 1
            else f"nodes {self.first_node}-{self.first_node + self.nodes - 1}"
        )
        if self.gpus == cluster.gpus_per_node:
            return nodes
        last = self.first_gpu + self.gpus - 1
        return f"{nodes} gpu {last}" if self.gpus == 1 else f"{nodes} gpus {self.first_gpu}-{last}"


_NUMBER = r"(\d{1,9})"
_MESH = re.compile(rf"\s*nodes?\s+{_NUMBER}(?:\s*-\s*{_NUMBER})?(?:\s+gpus?\s+{_NUMBER}(?:\s*-\s*{_NUMBER})?)?\s*")


def parse_mesh(text: str, cluster: ClusterSpec) -> DeviceMesh:
    """Read a mesh as `DeviceMesh.text` writes it; says which rule a mesh outside the cluster or off its grid breaks."""
    match = _MESH.fullmatch(text)
    if not match:
        raise SpecError(
            f"mesh `{shortened(text)}` is not a mesh", "`nodes 0-3`, `node 8`, `node 8 gpus 0-3` or `node 8 gpu 1`"
        )
    node0, node1, gpu0, gpu1 = (int(part) if part is not None else None for part in match.groups())
    assert node0 is not None
    nodes = (node1 if node1 is not None else node0) - node0 + 1
    first_gpu = gpu0 or 0
    gpus = cluster.gpus_per_node if gpu0 is None else (gpu1 if gpu1 is not None else gpu0) - gpu0 + 1
    if nodes < 1 or gpus < 1:
        raise SpecError(f"mesh `{text}` counts backwards", "write the smaller number first")
    mesh = DeviceMesh(first_node=node0, nodes=nodes, first_gpu=first_gpu, gpus=gpus)
    check_mesh(mesh, cluster, text)
    return mesh


def check_mesh(mesh: DeviceMesh, cluster: ClusterSpec, text: str = "") -> None:
    """Raise unless the mesh lies in the cluster and is whole nodes or an aligned power-of-two part of one node."""
    text = text or mesh.text(cluster)
    per_node = cluster.gpus_per_node
    if mesh.first_node + mesh.nodes > cluster.nodes:
        raise SpecError(
            f"mesh `{text}` reaches node {mesh.first_node + mesh.nodes - 1}; "
            f"the cluster has nodes 0-{cluster.nodes - 1}",
            f"a mesh inside `{cluster.whole.text(cluster)}`",
        )
    if mesh.first_gpu + mesh.gpus > per_node:
        raise SpecError(
            f"mesh `{text}` reaches GPU {mesh.first_gpu + mesh.gpus - 1}; a node has GPUs 0-{per_node - 1}",
            f"a range inside `gpus 0-{per_node - 1}`",
        )
    if mesh.gpus == per_node:
        return
    if mesh.nodes > 1:
        raise SpecError(
            f"mesh `{text}` takes {mesh.gpus} of {per_node} GPUs on {mesh.nodes} nodes; "
            "a part of a node stays on one node",
            f"`nodes {mesh.first_node}-{mesh.first_node + mesh.nodes - 1}` or `node {mesh.first_node} gpus "
            f"{mesh.first_gpu}-{mesh.first_gpu + mesh.gpus - 1}`",
        )
    if mesh.gpus & (mesh.gpus - 1):
        below = 1 << (mesh.gpus.bit_length() - 1)
        raise SpecError(
            f"mesh `{text}` has {mesh.gpus} GPUs; a part of a node has a power-of-two size",
            f"{below} GPUs" + (f" or {2 * below}" if 2 * below <= per_node else ""),
        )
    if mesh.first_gpu % mesh.gpus:
        start = mesh.first_gpu // mesh.gpus * mesh.gpus
        raise SpecError(
            f"mesh `{text}` starts at GPU {mesh.first_gpu}; "
            f"a part of {mesh.gpus} GPUs starts at a multiple of {mesh.gpus}",
            f"`node {mesh.first_node} gpus {start}-{start + mesh.gpus - 1}`",
        )
