"""What every node of a layout holds, for many layouts at once, as arrays.

What a node holds does not depend on where the mesh starts, and few different *contents* of a node occur in thousands
of layouts: a layout is its form (a row of contents, node by node) and its first node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from cost_models.candidates import Array, Flags
from plans.layout import Layout, model_units
from plans.model import ModelSpec

IntArray = NDArray[np.int64]
Slicing = tuple[int, int, int, tuple[int, ...]]  # pp, vpp, ep, a split of its own: which units a rank holds
Form = tuple[Slicing, int, int, int]  # slicing, tp, GPUs in the mesh, first GPU on its node


@dataclass(frozen=True, eq=False)
class UnitSizes:
    """Elements of each unit, or of units that go everywhere together: cut by tensor parallelism, and held whole; and
    how many they are. Shapes [units]."""

    sharded: Array
    replicated: Array
    count: Array


@lru_cache(maxsize=32)
def unit_sizes(spec: ModelSpec) -> UnitSizes:
    """Sizes of a model's units in pipeline order."""
    units = model_units(spec)
    return UnitSizes(
        sharded=np.array([u.sharded for u in units], dtype=np.float64),
        replicated=np.array([u.replicated for u in units], dtype=np.float64),
        count=np.ones(len(units)),
    )


@lru_cache(maxsize=256)
def _rank_units(spec: ModelSpec, slicing: Slicing) -> Flags:
    """[pp x ep, units] whether a rank of the stage at a place in its run of ep ranks holds the unit."""
    pp, vpp, ep, split = slicing
    index = {unit.name: i for i, unit in enumerate(model_units(spec))}
    layout = Layout(spec, tuple(range(pp * ep)), dp=ep, pp=pp, vpp=vpp, ep=ep, layers_per_stage=split)
    table = np.zeros((pp * ep, len(index)), dtype=np.bool_)
    for rank in layout.ranks:
        table[rank, [index[name] for name in layout.rank_units(rank)]] = True
    return table


@dataclass(frozen=True, eq=False)
class Contents:
    """The different contents of a node; number 0 is that of a node outside the mesh.

    stage: [contents, GPUs], the row of `units` that the GPU holds its tp part of. units: [stages, units], whether the
    stage (with experts: its ranks at one place of their runs) holds the unit; stage 0 holds nothing. tp: [contents];
    GPU g has the part g % tp of every sharded parameter.
    """

    stage: IntArray
    tp: IntArray
    units: Flags

    def __len__(self) -> int:
        return len(self.tp)

    @cached_property
    def stage_units(self) -> Array:
        """[stages, units] 1 where the stage holds the unit, as matrix products want it."""
        return self.units.astype(np.float64)

    @cached_property
    def node_units(self) -> Array:
        """[contents, units] 1 where the node holds the unit (then with all its tp parts)."""
        return np.asarray(self.units[self.stage].any(axis=1), dtype=np.float64)

    def take(self, numbers: IntArray) -> Contents:
        """Some of the contents, with the stages that occur in them; number 0 stays the first."""
        stages, stage = np.unique(np.append(self.stage[numbers], 0), return_inverse=True)
        shape = (len(numbers), self.stage.shape[1])
        return Contents(stage.reshape(-1)[:-1].reshape(shape), self.tp[numbers], self.units[stages])


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

    def take(self, layouts: IntArray) -> Holdings:
        """Some of the layouts, with what their nodes hold."""
        forms, form = np.unique(self.form[layouts], return_inverse=True)
        numbers, content = np.unique(np.append(self.content[forms], 0), return_inverse=True)
        shape = (len(forms), self.content.shape[1])
        return Holdings(
            contents=self.contents.take(numbers),
            content=content.reshape(-1)[:-1].reshape(shape),
            form=form.reshape(-1),
            first=self.first[layouts],
            last=self.last[layouts],
        )


def _form(layout: Layout, per_node: int) -> Form:
    first_gpu, size = layout.ranks[0] % per_node, len(layout.ranks)
    in_node = first_gpu + size <= per_node or per_node % layout.tp == 0
    assert in_node and first_gpu % layout.tp == 0, f"tp groups of {layout.tp} span nodes"
    return (layout.pp, layout.vpp, layout.ep, layout.layers_per_stage), layout.tp, size, first_gpu


def _contents(spec: ModelSpec, forms: Sequence[Form], per_node: int) -> tuple[Contents, IntArray]:
    """The different contents of the nodes of some forms, and their numbers [forms, nodes]."""
    slicings = list(dict.fromkeys(slicing for slicing, *_ in forms))
    before = np.cumsum([1] + [pp * ep for pp, _, ep, _ in slicings])
    offset = dict(zip(slicings, before.tolist(), strict=False))
    nodes = max((first_gpu + size - 1) // per_node for *_, size, first_gpu in forms) + 1
    place = np.arange(nodes * per_node)
    rows = np.zeros((len(forms), nodes, 1 + per_node), dtype=np.int64)
    for row, (slicing, tp, size, first_gpu) in zip(rows, forms, strict=True):
        inside = (place >= first_gpu) & (place < first_gpu + size)
        (pp, _, ep, _), inside_mesh = slicing, place - first_gpu
        stage = offset[slicing] + inside_mesh // (size // pp) * ep + inside_mesh % ep
        row[:, 1:] = np.where(inside, stage, 0).reshape(nodes, per_node)
        row[:, 0] = np.where(row[:, 1:].any(axis=1), tp, 0)
    outside = np.zeros((1, 1 + per_node), dtype=np.int64)
    different, number = np.unique(
        np.concatenate([outside, rows.reshape(-1, 1 + per_node)]), axis=0, return_inverse=True
    )
    nothing = np.zeros((1, len(model_units(spec))), dtype=np.bool_)
    units = [nothing, *(_rank_units(spec, slicing) for slicing in slicings)]
    contents = Contents(different[:, 1:], np.maximum(different[:, 0], 1), np.concatenate(units))
    return contents, number.reshape(-1)[1:].reshape(len(forms), nodes)


def merged(sizes: UnitSizes, source: Contents, target: Contents) -> tuple[UnitSizes, Contents, Contents]:
    """The same with units that the same stages hold, in all layouts of both sides, taken as one.

    Thousands of experts (94 layers of 128) are few dozen kinds: a block and a share of its experts are always together.
    Units without sharded parameters travel in another way and are kept apart from the rest.
    """
    table = np.concatenate([source.units, target.units, sizes.sharded[None] > 0])
    packed = np.ascontiguousarray(np.packbits(table, axis=0).T)
    _, first, kind = np.unique(packed.view(f"V{packed.shape[1]}")[:, 0], return_index=True, return_inverse=True)
    sums = [np.bincount(kind, weights=w).astype(np.float64) for w in (sizes.sharded, sizes.replicated, sizes.count)]
    ours, theirs = (replace(contents, units=contents.units[:, first]) for contents in (source, target))
    return UnitSizes(*sums), ours, theirs
