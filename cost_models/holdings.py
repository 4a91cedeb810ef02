"""What every node of a layout holds, for many layouts at once, as arrays.

What a node holds does not depend on where the mesh starts, and few different *contents* of a node occur in thousands
of layouts: a layout is its form (a row of contents, node by node) and its first node. What a GPU holds of a model with
experts is a product, the blocks of its stage x a share of every block's experts, so that the thousands of experts of a
model (94 blocks of 128) are never listed one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cost_models.candidates import Array, Flags
from plans.layout import Layout, expert_of, model_units, trained_units
from plans.model import ModelSpec

if TYPE_CHECKING:  # models with experts alone need it, and it is a third of the start of a command
    from scipy.sparse import csr_matrix

IntArray = NDArray[np.int64]
Slicing = tuple[int, int, tuple[int, ...]]  # pp, vpp, a split of its own: which units a stage holds
Form = tuple[Slicing, int, int, int, int]  # slicing, ep, tp, GPUs in the mesh, first GPU on its node


@dataclass(frozen=True, eq=False)
class UnitSizes:
    """Elements of each unit that is no expert: cut by tensor parallelism, and held whole; and of one expert of the unit
    (0 where it has none). Only what a reallocation moves counts. Shapes [units]."""

    sharded: Array
    replicated: Array
    expert: Array


@lru_cache(maxsize=32)
def unit_sizes(spec: ModelSpec) -> UnitSizes:
    """Sizes of a model's units in pipeline order."""
    units = [unit.name for unit in model_units(spec) if expert_of(unit.name) is None]
    moved = {unit.name: unit for unit in trained_units(spec)}
    expert = {name: unit.replicated for name, unit in moved.items() if expert_of(name) == 0}
    return UnitSizes(
        sharded=np.array([moved[name].sharded if name in moved else 0 for name in units], dtype=np.float64),
        replicated=np.array([moved[name].replicated if name in moved else 0 for name in units], dtype=np.float64),
        expert=np.array([expert.get(f"{name}.expert.0", 0) for name in units], dtype=np.float64),
    )


@lru_cache(maxsize=256)
def _stage_units(spec: ModelSpec, slicing: Slicing) -> Flags:
    """[pp, units] whether a stage holds the unit, experts left out."""
    pp, vpp, split = slicing
    units = (unit.name for unit in model_units(spec) if expert_of(unit.name) is None)
    index = {name: i for i, name in enumerate(units)}
    layout = Layout(spec, tuple(range(pp)), pp=pp, vpp=vpp, layers_per_stage=split)
    table = np.zeros((pp, len(index)), dtype=np.bool_)
    for stage in range(pp):
        table[stage, [index[name] for name in layout.stage_units(stage) if expert_of(name) is None]] = True
    return table


def _shares(spec: ModelSpec, ep: int) -> Flags:
    """[ep, experts] whether the rank at a place in its run of ep ranks holds the expert of every block."""
    layout = Layout(spec, tuple(range(ep)), dp=ep, ep=ep)
    table = np.zeros((ep, spec.experts), dtype=np.bool_)
    for rank in layout.ranks:
        table[rank, list(layout.experts_of(rank))] = True
    return table


@dataclass(frozen=True, eq=False)
class Parts:
    """Products of blocks and experts that some contents consist of: of every block of a stage the same experts.

    stage: [parts]. experts: [parts, experts] 1 where the part has the expert. of: [contents, parts], how often.
    """

    stage: IntArray
    experts: Array
    of: csr_matrix


@dataclass(frozen=True, eq=False)
class Contents:
    """The different contents of a node; number 0 is that of a node outside the mesh.

    stage: [contents, GPUs], the row of `units` that the GPU holds its tp part of; share: [contents, GPUs], the row of
    `experts` that it holds of every block of the stage. units: [stages, units]; experts: [shares, experts]; the first
    row of both is nothing. tp: [contents]; GPU g has the part g % tp of every sharded parameter.
    """

    stage: IntArray
    share: IntArray
    tp: IntArray
    units: Flags
    experts: Flags

    def __len__(self) -> int:
        return len(self.tp)

    @cached_property
    def even(self) -> Flags:
        """[contents] whether all GPUs of the node hold the same stage and share."""
        even: Flags = ((self.stage == self.stage[:, :1]) & (self.share == self.share[:, :1])).all(axis=1)
        return even

    @cached_property
    def stage_units(self) -> Array:
        """[stages, units] 1 where the stage holds the unit, as matrix products want it."""
        return self.units.astype(np.float64)

    @cached_property
    def share_experts(self) -> Array:
        """[shares, experts] 1 where the share has the expert."""
        return self.experts.astype(np.float64)

    @cached_property
    def node_units(self) -> Array:
        """[contents, units] 1 where the node holds the unit (then with all its tp parts)."""
        return np.asarray(self.units[self.stage].any(axis=1), dtype=np.float64)

    @cached_property
    def gpu_parts(self) -> Parts:
        """What the GPUs of every content hold of experts, each for itself."""
        from scipy.sparse import csr_matrix

        width = len(self.experts)
        keys, part = np.unique(self.stage * width + self.share, return_inverse=True)
        row = np.repeat(np.arange(len(self)), self.stage.shape[1])
        of = csr_matrix((np.ones(len(row)), (row, part.reshape(-1))), shape=(len(self), len(keys)))
        return Parts(keys // width, self.share_experts[keys % width], of)

    @cached_property
    def node_parts(self) -> Parts:
        """What the nodes hold of experts: GPUs of one stage together hold all that one of them holds."""
        from scipy.sparse import csr_matrix

        row = np.repeat(np.arange(len(self)), self.stage.shape[1])
        keys, inverse = np.unique(row * len(self.units) + self.stage.reshape(-1), return_inverse=True)
        together = np.zeros((len(keys), self.experts.shape[1]), dtype=np.bool_)
        np.logical_or.at(together, inverse.reshape(-1), self.experts[self.share.reshape(-1)])
        stage = keys % len(self.units)
        table = np.concatenate([stage.astype(">i8").view(np.uint8).reshape(-1, 8), np.packbits(together, axis=1)], 1)
        packed = np.ascontiguousarray(table).view(f"V{table.shape[1]}")[:, 0]
        _, first, part = np.unique(packed, return_index=True, return_inverse=True)
        of = csr_matrix((np.ones(len(keys)), (keys // len(self.units), part)), shape=(len(self), len(first)))
        return Parts(stage[first], together[first].astype(np.float64), of)

    def take(self, numbers: IntArray) -> Contents:
        """Some of the contents, with the stages and shares that occur in them; number 0 stays the first."""
        stages, stage = _occurring(self.stage[numbers])
        shares, share = _occurring(self.share[numbers])
        return Contents(stage, share, self.tp[numbers], self.units[stages], self.experts[shares])


def _occurring(numbers: IntArray) -> tuple[IntArray, IntArray]:
    """The different numbers in an array, 0 among them, and the array in their places."""
    found, place = np.unique(np.append(numbers, 0), return_inverse=True)
    return found, place.reshape(-1)[:-1].reshape(numbers.shape)


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

    @cached_property
    def form_nodes(self) -> IntArray:
        """Nodes of a mesh of each form, [forms]."""
        return np.asarray((self.content > 0).sum(axis=1))

    def contents_of(self, forms: IntArray) -> tuple[Contents, IntArray]:
        """What the nodes of some forms hold, and the numbers of that, [forms, nodes]."""
        numbers, content = _occurring(self.content[forms])
        return self.contents.take(numbers), content


def _form(layout: Layout, per_node: int) -> Form:
    first_gpu, size = layout.ranks[0] % per_node, len(layout.ranks)
    in_node = first_gpu + size <= per_node or per_node % layout.tp == 0
    assert in_node and first_gpu % layout.tp == 0, f"tp groups of {layout.tp} span nodes"
    return (layout.pp, layout.vpp, layout.layers_per_stage), layout.ep, layout.tp, size, first_gpu


def _contents(spec: ModelSpec, forms: Sequence[Form], per_node: int) -> tuple[Contents, IntArray]:
    """The different contents of the nodes of some forms, and their numbers [forms, nodes]."""
    slicings = list(dict.fromkeys(slicing for slicing, *_ in forms))
    degrees = list(dict.fromkeys(ep for _, ep, *_ in forms))
    units = [np.zeros((1, len(unit_sizes(spec).sharded)), np.bool_), *(_stage_units(spec, s) for s in slicings)]
    experts = [np.zeros((1, spec.experts), np.bool_), *(_shares(spec, ep) for ep in degrees)]
    stage_of = dict(zip(slicings, np.cumsum([len(rows) for rows in units]).tolist(), strict=False))
    share_of = dict(zip(degrees, np.cumsum([len(rows) for rows in experts]).tolist(), strict=False))
    nodes = max((first_gpu + size - 1) // per_node for *_, size, first_gpu in forms) + 1
    different, content = _different_rows(
        _node_rows(form, stage_of[form[0]], share_of[form[1]], nodes, per_node) for form in forms
    )
    contents = Contents(
        stage=different[:, 1 : 1 + per_node],
        share=different[:, 1 + per_node :],
        tp=np.maximum(different[:, 0], 1),
        units=np.concatenate(units),
        experts=np.concatenate(experts),
    )
    return contents, content


def _node_rows(form: Form, first_stage: int, first_share: int, nodes: int, per_node: int) -> IntArray:
    """What every node holds under a form: tp, then the stage and then the share of each GPU; zeros outside the mesh.
    Stages and shares are counted from the form's first ones. Shape [nodes, 1 + 2 GPUs]."""
    (pp, *_), ep, tp, size, first_gpu = form
    at = np.arange(nodes * per_node) - first_gpu
    inside = (at >= 0) & (at < size)
    stage = np.where(inside, first_stage + at // (size // pp), 0).reshape(nodes, per_node)
    share = np.where(inside, first_share + at % ep, 0).reshape(nodes, per_node)
    degree = np.where(inside.reshape(nodes, per_node).any(axis=1), tp, 0)
    return np.concatenate([degree[:, None], stage, share], axis=1)


def _different_rows(tables: Iterable[IntArray]) -> tuple[IntArray, IntArray]:
    """The different rows of tables of one shape [rows, columns], the row of zeros among them as the first, and the
    number of each, [tables, rows]. Of equal rows in succession one is sorted: stages are many nodes long."""
    rows, starts = [], []
    for table in tables:
        start = np.ones(len(table), dtype=np.bool_)
        start[1:] = (table[1:] != table[:-1]).any(axis=1)
        rows.append(table[start])
        starts.append(start)
    zeros = np.zeros_like(rows[0][:1])
    different, number = np.unique(np.concatenate([zeros, *rows]), axis=0, return_inverse=True)
    place = np.cumsum(np.stack(starts)).reshape(len(starts), -1)
    return different, number.reshape(-1)[place]
