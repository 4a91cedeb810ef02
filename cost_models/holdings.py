"""Which rank and which node holds which units of a model, for many layouts at once, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cost_models.candidates import Array, Flags
from plans.cluster import ClusterSpec
from plans.layout import Layout, model_units
from plans.model import ModelSpec


@dataclass(frozen=True, eq=False)
class UnitSizes:
    """Elements of each unit: cut by tensor parallelism, and held whole. Shapes [units]."""

    sharded: Array
    replicated: Array


@lru_cache(maxsize=32)
def unit_sizes(spec: ModelSpec) -> UnitSizes:
    """Sizes of a model's units in pipeline order."""
    units = model_units(spec)
    return UnitSizes(
        sharded=np.array([u.sharded for u in units], dtype=np.float64),
        replicated=np.array([u.replicated for u in units], dtype=np.float64),
    )


@lru_cache(maxsize=256)
def _stage_table(spec: ModelSpec, pp: int, vpp: int) -> Array:
    """[pp + 1, units] 1 where the stage holds the unit; the row after the last is that of no stage."""
    index = {unit.name: i for i, unit in enumerate(model_units(spec))}
    layout = Layout(spec, tuple(range(pp)), pp=pp, vpp=vpp)
    table = np.zeros((pp + 1, len(index)))
    for stage in range(pp):
        table[stage, [index[name] for name in layout.stage_units(stage)]] = 1.0
    return table


@dataclass(frozen=True, eq=False)
class Holdings:
    """Layouts of one model. stage: [layouts, ranks], the row of `tables` (its last row: not in the mesh).
    start, stop: [layouts, ranks], the fraction of every sharded parameter that the rank holds (0, 0 outside).
    """

    tables: tuple[Array, ...]
    stage: NDArray[np.int64]
    start: Array
    stop: Array
    per_node: int

    @classmethod
    def of(cls, layouts: Sequence[Layout], cluster: ClusterSpec) -> Holdings:
        """The holdings of layouts of one model on contiguous ranks."""
        ranks = np.arange(cluster.size)
        stage = np.zeros((len(layouts), cluster.size), dtype=np.int64)
        start, stop = np.zeros(stage.shape), np.zeros(stage.shape)
        for row, layout in enumerate(layouts):
            place = ranks - layout.ranks[0]
            inside = (place >= 0) & (place < len(layout.ranks))
            tp = place % layout.tp
            stage[row] = np.where(inside, place // (layout.tp * layout.cp * layout.dp), layout.pp)
            start[row] = np.where(inside, tp / layout.tp, 0.0)
            stop[row] = np.where(inside, (tp + 1) / layout.tp, 0.0)
        tables = tuple(_stage_table(layout.spec, layout.pp, layout.vpp) for layout in layouts)
        return cls(tables, stage, start, stop, cluster.gpus_per_node)

    def units_of_rank(self, rank: int) -> Array:
        """[layouts, units] 1 where the rank holds a part of the unit."""
        return np.stack([table[stage] for table, stage in zip(self.tables, self.stage[:, rank], strict=True)])

    def units_of_node(self, node: int) -> Array:
        """[layouts, units] 1 where some rank of the node holds a part of the unit."""
        ranks = range(node * self.per_node, (node + 1) * self.per_node)
        return np.stack(
            [table[stages].max(axis=0) for table, stages in zip(self.tables, self.stage[:, ranks], strict=True)]
        )

    def node_fraction(self, node: int) -> tuple[Array, Array, Array]:
        """Start and stop of the fraction that a node's ranks hold together, and how many different parts of it;
        shapes [layouts]."""
        ranks = slice(node * self.per_node, (node + 1) * self.per_node)
        inside = self.inside[:, ranks]
        start = np.where(inside, self.start[:, ranks], 1.0).min(axis=1)
        stop = np.where(inside, self.stop[:, ranks], 0.0).max(axis=1)
        width = np.where(inside, self.stop[:, ranks] - self.start[:, ranks], 0.0).max(axis=1)
        length = np.maximum(stop - start, 0.0)
        parts = np.round(np.divide(length, width, out=np.zeros_like(length), where=width > 0))
        return start, stop, parts

    @property
    def inside(self) -> Flags:
        """[layouts, ranks] whether the rank is in the mesh."""
        return self.stop > self.start
