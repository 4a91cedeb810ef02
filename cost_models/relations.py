"""Pairs of layouts by what tells their reallocations apart: the forms of both, and how far apart their meshes begin.

On a thousand GPUs two million relations stand for twenty million pairs of layouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.candidates import Array, Flags
from cost_models.holdings import Holdings, IntArray
from plans.layout import Layout

PAIRS_AT_ONCE = 2**21
"""Pairs of layouts, of node contents or of nodes that meet, that are looked at together."""


@dataclass(frozen=True, eq=False)
class Relations:
    """The different relations of sources and targets, in the order of the sources' forms.

    row, column: [relations], form of the source and of the target. offset: [relations], first node of the target
    counted from that of the source; where the meshes share no node, minus the target's nodes. number: the relation of
    every legal (form, form, offset), which are counted from `base` [source forms, target forms] on.
    """

    source: Holdings
    target: Holdings
    row: IntArray
    column: IntArray
    offset: IntArray
    base: IntArray
    number: NDArray[np.int32]

    @classmethod
    def of(cls, sources: Sequence[Layout], targets: Sequence[Layout], per_node: int) -> Relations:
        """Relations between layouts of one model."""
        source, target = (Holdings.of(layouts, per_node) for layouts in (sources, targets))
        ours, theirs = source.form_nodes, target.form_nodes
        places = ours[:, None] + theirs
        base = np.cumsum(places).reshape(places.shape) - places
        occurs = np.zeros(int(places.sum()), dtype=np.bool_)
        for rows in _rows(len(source.form), len(target.form)):
            occurs[_places(source, target, base, rows)] = True
        found = np.flatnonzero(occurs)
        pair = np.searchsorted(base.reshape(-1), found, side="right") - 1
        row, column = np.divmod(pair, base.shape[1])
        offset = found - base[row, column] - theirs[column]
        number = np.cumsum(occurs, dtype=np.int32) - np.int32(1)
        return cls(source, target, row, column, offset, base, number)

    def __len__(self) -> int:
        return len(self.row)

    def spread(self, figure: Array) -> Array:
        """A figure of relations for every pair of layouts, [sources, targets]."""
        whole = np.empty((len(self.source.form), len(self.target.form)))
        for rows in _rows(*whole.shape):
            whole[rows] = figure[self.number[_places(self.source, self.target, self.base, rows)]]
        return whole

    def of_forms(self, forms: range) -> slice:
        """The relations of some source forms."""
        return slice(*np.searchsorted(self.row, (forms.start, forms.stop)).tolist())

    def parts(self) -> Iterator[range]:
        """Runs of source forms that have few relations and few contents."""
        relations = np.bincount(self.row, minlength=len(self.base))
        different = np.array([len(set(contents)) for contents in self.source.content.tolist()])
        part = np.cumsum(4 * relations + different * len(self.target.contents)) // PAIRS_AT_ONCE
        starts = np.flatnonzero(np.diff(part, prepend=-1)).tolist()
        for start, stop in zip(starts, [*starts[1:], len(part)], strict=True):
            yield range(start, stop)


def _rows(sources: int, targets: int) -> Iterator[slice]:
    step = max(1, PAIRS_AT_ONCE // targets)
    return (slice(start, min(start + step, sources)) for start in range(0, sources, step))


def _places(source: Holdings, target: Holdings, base: IntArray, rows: slice) -> IntArray:
    """Places of pairs among all legal (form, form, offset), [rows, targets]."""
    form = source.form[rows]
    # 0 or less: the target ends before the source
    from_end = (target.first + target.nodes) - source.first[rows, None]
    shared = (from_end > 0) & (from_end < source.form_nodes[form, None] + target.nodes)
    places: IntArray = base[form][:, target.form]
    places += from_end * shared
    return places


@dataclass(frozen=True, eq=False)
class Meeting:
    """The nodes that source and target have in common, for some relations.

    shared: [relations], whether there are some. cells: the pairs of contents that meet on a node, as an index into a
    flat [source contents, target contents], and after nothing all that a target has. cell: [nodes that meet], which of
    `cells`; those of a relation stand together, the first at `start`. before, after: [relations that share], the first
    shared node and the one after the last, counted in the target's mesh.
    """

    content: IntArray
    column: IntArray
    shared: Flags
    cells: IntArray
    cell: IntArray
    start: IntArray
    before: IntArray
    after: IntArray

    @classmethod
    def of(
        cls, source: IntArray, target: IntArray, row: IntArray, column: IntArray, offset: IntArray, contents: int
    ) -> Meeting:
        """source, target: [forms, nodes], contents of the nodes. row, column: forms of the relations."""
        ours, theirs = ((content > 0).sum(axis=1) for content in (source, target))
        low, high = np.maximum(offset, 0), np.minimum(offset + theirs[column], ours[row])
        shared = high > low
        first, low, count = offset[shared], low[shared], (high - low)[shared]
        start = np.cumsum(count) - count
        step = np.arange(count.sum())
        ours, theirs = row[shared] * source.shape[1] + low, column[shared] * target.shape[1] + low - first
        holds = source.reshape(-1)[step + np.repeat(ours - start, count)]
        met = holds * contents + target.reshape(-1)[step + np.repeat(theirs - start, count)]
        occurs = np.zeros((int(source.max()) + 1) * contents, dtype=np.bool_)
        occurs[:contents] = True  # the contents of nodes that the source has not
        occurs[met] = True
        number = np.cumsum(occurs, dtype=np.int64) - 1
        return cls(
            content=target, column=column, shared=shared, cells=np.flatnonzero(occurs), cell=number[met], start=start,
            before=low - first, after=low - first + count,
        )  # fmt: skip

    def over_nodes(self, figure: Array, combine: np.ufunc) -> Array:
        """A figure of cells summed (or the largest) over the nodes of the target's mesh, [relations]."""
        apart = figure[self.content]
        zero = np.zeros((len(apart), 1))
        left = np.concatenate([zero, combine.accumulate(apart, axis=1)], axis=1)
        right = np.concatenate([combine.accumulate(apart[:, ::-1], axis=1)[:, ::-1], zero], axis=1)
        result: Array = left[self.column, -1]
        form = self.column[self.shared]
        if len(form):
            outside = combine(left[form, self.before], right[form, self.after])
            result[self.shared] = combine(outside, combine.reduceat(figure[self.cell], self.start))
        return result
