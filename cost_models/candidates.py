"""Candidates: many (mesh, strategy) pairs of one call as equal-length arrays, so that one numpy pass costs them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from plans.cluster import DeviceMesh
from plans.strategy import ParallelStrategy, Recompute

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

NO_RECOMPUTE, SELECTIVE_RECOMPUTE, FULL_RECOMPUTE = 0, 1, 2
RECOMPUTE_CODE = {
    Recompute.NONE: NO_RECOMPUTE,
    Recompute.SELECTIVE: SELECTIVE_RECOMPUTE,
    Recompute.FULL: FULL_RECOMPUTE,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """Struct of arrays, shape [candidates] each.

    gpus_per_node: GPUs used on each node of the mesh; nodes: nodes of the mesh. The degrees and settings are those of
    `ParallelStrategy`; `recompute` is 0 none, 1 selective, 2 full. own_fullest, own_last: layers of the fullest and of
    the last stage of a split of one's own, 0 for the default split. Integers are held as float64, the type they are
    computed with.
    """

    gpus_per_node: Array
    nodes: Array
    dp: Array
    tp: Array
    pp: Array
    cp: Array
    ep: Array
    vpp: Array
    own_fullest: Array
    own_last: Array
    micro_batches: Array
    micro_batch_tokens: Array
    groups: Array
    slots: Array
    waves: Array
    sequence_parallel: Flags
    recompute: NDArray[np.int8]
    shard_optimizer: Flags
    offload: Flags

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, f.name)) for f in fields(self)}
        assert len(lengths) == 1, f"arrays of different lengths {sorted(lengths)}"

    def __len__(self) -> int:
        return len(self.dp)

    @classmethod
    def of(cls, pairs: Sequence[tuple[DeviceMesh, ParallelStrategy]]) -> Candidates:
        """The arrays of a list of (mesh, strategy)."""

        def floats(values: list[int]) -> Array:
            return np.array(values, dtype=np.float64)

        def flags(values: list[bool]) -> Flags:
            return np.array(values, dtype=np.bool_)

        strategies = [strategy for _, strategy in pairs]
        return cls(
            gpus_per_node=floats([mesh.gpus for mesh, _ in pairs]),
            nodes=floats([mesh.nodes for mesh, _ in pairs]),
            dp=floats([s.dp for s in strategies]),
            tp=floats([s.tp for s in strategies]),
            pp=floats([s.pp for s in strategies]),
            cp=floats([s.cp for s in strategies]),
            ep=floats([s.ep for s in strategies]),
            vpp=floats([s.vpp for s in strategies]),
            own_fullest=floats([max(s.layers_per_stage, default=0) for s in strategies]),
            own_last=floats([(s.layers_per_stage or (0,))[-1] for s in strategies]),
            micro_batches=floats([s.micro_batches for s in strategies]),
            micro_batch_tokens=floats([s.micro_batch_tokens for s in strategies]),
            groups=floats([s.groups for s in strategies]),
            slots=floats([s.slots for s in strategies]),
            waves=floats([s.waves for s in strategies]),
            sequence_parallel=flags([s.sequence_parallel for s in strategies]),
            recompute=np.array([RECOMPUTE_CODE[s.recompute] for s in strategies], dtype=np.int8),
            shard_optimizer=flags([s.shard_optimizer for s in strategies]),
            offload=flags([s.offload for s in strategies]),
        )

    def take(self, indices: NDArray[np.intp] | Sequence[int]) -> Candidates:
        """The candidates at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.intp)
        return Candidates(**{f.name: getattr(self, f.name)[chosen] for f in fields(self)})

    def ranks_per_node(self, stride: Array, size: Array) -> Array:
        """Ranks of one node that belong to the same group of `size` ranks that are `stride` apart."""
        return np.clip(np.floor(self.gpus_per_node / stride), 1.0, size)

    @property
    def joined_replicas(self) -> Array:
        """Replicas that share experts, and so generate in step (`Layout.joined_replicas`)."""
        own = (self.tp * self.cp).astype(np.int64)
        return np.lcm(own, self.ep.astype(np.int64)) / own

    @property
    def tensor_group(self) -> tuple[Array, Array]:
        """Size of the tp groups, and how many of their ranks are on one node."""
        return self.tp, self.ranks_per_node(np.ones_like(self.tp), self.tp)
