"""What every node of a layout holds, for many layouts at once, as arrays.

What a node holds does not depend on where the mesh starts, and few different *contents* of a node occur in thousands
of layouts: a layout is its form (a row of contents, node by node) and its first node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cost_models.candidates import Array
from plans.layout import Layout, model_units
from plans.model import ModelSpec

IntArray = NDArray[np.int64]
Slicing = tuple[int, int]  # pp, vpp: which units a stage holds
Form = tuple[Slicing, int, int, int]  # slicing, tp, GPUs in the mesh, first GPU on its node


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
def _stage_units(spec: ModelSpec, slicing: Slicing) -> Array:
    """[pp, units] 1 where the stage holds the unit."""
    pp, vpp = slicing
    index = {unit.name: i for i, unit in enumerate(model_units(spec))}
    layout = Layout(spec, tuple(range(pp)), pp=pp, vpp=vpp)
    table = np.zeros((pp, len(index)))
    for stage in range(pp):
        table[stage, [index[name] for name in layout.stage_units(stage)]] = 1.0
    return table


@dataclass(frozen=True, eq=False)
class Contents:
    """The different contents of a node; number 0 is that of a node outside the mesh.

    stage: [contents, GPUs], the row of `units` that the GPU holds its tp part of. units: [stages, units], 1 where the
    stage holds the unit; stage 0 holds nothing. tp: [contents]; GPU g has the part g % tp of every sharded parameter.
    """

    stage: IntArray
    tp: IntArray
    units: Array

    def __len__(self) -> int:
        return len(self.tp)

    @property
    def node_units(self) -> Array:
        """[contents, units] 1 where the node holds the unit (then with all its tp parts)."""
        held: Array = self.units[self.stage].max(axis=1)
        return held


@dataclass(frozen=True, eq=False)
class Holdings:
    """Layouts of one model: form, first and last node of each, [layouts]; content: [forms, nodes], the number of the
    content of each node of a form, 0 after its last node."""

    contents: Contents
    content: IntArray
    form: IntArray
    first: IntArray
    last: IntArray

    @classmethod
    def of(cls, layouts: Sequence[Layout], per_node: int) -> Holdings:
        """The holdings of layouts of one model on contiguous ranks, tp groups inside a node."""
        forms: dict[Form, int] = {}
        form = [forms.setdefault(_form(layout, per_node), len(forms)) for layout in layouts]
        contents, content = _contents(layouts[0].spec, list(forms), per_node)
        first = np.array([layout.ranks[0] for layout in layouts], dtype=np.int64)
        last = first + np.array([len(layout.ranks) for layout in layouts]) - 1
        return cls(contents, content, np.array(form, dtype=np.int64), first // per_node, last // per_node)

    @property
    def nodes(self) -> IntArray:
        """Nodes of each mesh, [layouts]."""
        return self.last - self.first + 1


def _form(layout: Layout, per_node: int) -> Form:
    first_gpu, size = layout.ranks[0] % per_node, len(layout.ranks)
    in_node = first_gpu + size <= per_node or per_node % layout.tp == 0
    assert in_node and first_gpu % layout.tp == 0, f"tp groups of {layout.tp} span nodes"
    return (layout.pp, layout.vpp), layout.tp, size, first_gpu


def _contents(spec: ModelSpec, forms: Sequence[Form], per_node: int) -> tuple[Contents, IntArray]:
    """The different contents of the nodes of some forms, and their numbers [forms, nodes]."""
    slicings = list(dict.fromkeys(slicing for slicing, *_ in forms))
    before = np.cumsum([1] + [pp for pp, _ in slicings])
    offset = dict(zip(slicings, before.tolist(), strict=False))
    nodes = max((first_gpu + size - 1) // per_node for *_, size, first_gpu in forms) + 1
    place = np.arange(nodes * per_node)
    rows = np.zeros((len(forms), nodes, 1 + per_node), dtype=np.int64)
    for row, (slicing, tp, size, first_gpu) in zip(rows, forms, strict=True):
        inside = (place >= first_gpu) & (place < first_gpu + size)
        stage = offset[slicing] + (place - first_gpu) // (size // slicing[0])
        row[:, 1:] = np.where(inside, stage, 0).reshape(nodes, per_node)
        row[:, 0] = np.where(row[:, 1:].any(axis=1), tp, 0)
    outside = np.zeros((1, 1 + per_node), dtype=np.int64)
    different, number = np.unique(
        np.concatenate([outside, rows.reshape(-1, 1 + per_node)]), axis=0, return_inverse=True
    )
    units = [np.zeros((1, len(model_units(spec)))), *(_stage_units(spec, slicing) for slicing in slicings)]
    contents = Contents(different[:, 1:], np.maximum(different[:, 0], 1), np.concatenate(units))
    return contents, number.reshape(-1)[1:].reshape(len(forms), nodes)
