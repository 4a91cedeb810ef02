"""Options of a call that differ only in position are one shape with several places, as the exact model sees them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planner.search.problem import FloatArray, IntArray, Moves, SearchProblem


@dataclass(frozen=True, eq=False)
class Shapes:
    """Distinct (width, time, resident, transient, copy, layout) of one call, as columns of length n_shapes.

    members: the options of each shape.
    """

    width: IntArray
    time_s: FloatArray
    resident_bytes: FloatArray
    transient_bytes: FloatArray
    shared_bytes: FloatArray
    layout: IntArray
    members: tuple[IntArray, ...]

    def __len__(self) -> int:
        return len(self.width)

    def take(self, keep: IntArray) -> Shapes:
        """The shapes at the indices `keep`, in that order."""
        columns = ("width", "time_s", "resident_bytes", "transient_bytes", "shared_bytes", "layout")
        return Shapes(
            **{name: getattr(self, name)[keep] for name in columns}, members=tuple(self.members[s] for s in keep)
        )


@dataclass(frozen=True, eq=False)
class MoveTable:
    """Least reallocation seconds of two shapes over their places: [shapes of trainer, shapes of consumer].

    anywhere_s: on any two meshes; apart_s: on two different meshes or with different layouts.
    """

    anywhere_s: FloatArray
    apart_s: FloatArray


def shapes_of(problem: SearchProblem, call: int) -> Shapes:
    """The shapes of a call's options."""
    o = problem.options[call]
    columns = [o.width, o.time_s, o.resident_bytes, o.transient_bytes, o.shared_bytes, o.layout]
    rows, of_option = np.unique(np.stack(columns, axis=1).astype(np.float64), axis=0, return_inverse=True)
    width, layout = rows[:, 0].astype(np.int64), rows[:, 5].astype(np.int64)
    order, begins = np.argsort(of_option.reshape(-1), kind="stable"), np.bincount(of_option.reshape(-1)).cumsum()
    members = tuple(np.split(order, begins[:-1]))
    return Shapes(width, rows[:, 1], rows[:, 2], rows[:, 3], rows[:, 4], layout, members)


def _least(moves: Moves, rows: Shapes, columns: Shapes) -> FloatArray:
    """Minimum of the seconds over the options of each pair of shapes."""
    by_row = np.stack([moves.seconds[np.unique(moves.row[members])].min(axis=0) for members in rows.members])
    return np.stack([by_row[:, np.unique(moves.column[members])].min(axis=1) for members in columns.members], axis=1)


def move_table(problem: SearchProblem, u: int, v: int, rows: Shapes, columns: Shapes) -> MoveTable:
    """Reallocation between the shapes of trainer u and consumer v."""
    moves, a, b = problem.moves[u, v], problem.options[u], problem.options[v]
    anywhere = _least(moves, rows, columns)
    apart = anywhere.copy()
    alike = (rows.width[:, None] == columns.width) & (rows.layout[:, None] == columns.layout)
    for i, j in np.argwhere(alike):
        sources, targets = rows.members[i], columns.members[j]
        elsewhere = moves.between(sources, targets)[a.first[sources][:, None] != b.first[targets]]
        if elsewhere.size:
            apart[i, j] = elsewhere.min()
    return MoveTable(anywhere, apart)


def gpu_unit(problem: SearchProblem) -> int:
    """The largest step of the GPU axis that every mesh begins and ends on."""
    return math.gcd(problem.gpus, *(int(x) for o in problem.options for x in {*o.first.tolist(), *o.width.tolist()}))
