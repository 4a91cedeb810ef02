"""Options of a call that differ only in position are one shape with several places, as the exact model sees them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planner.problem import FloatArray, IntArray, Problem


@dataclass(frozen=True, eq=False)
class Shapes:
    """Distinct (width, time, resident, transient, copy, layout) of one call, as columns of length n_shapes.

    of_option [n_options] is the shape of each option.
    """

    width: IntArray
    time_s: FloatArray
    resident_bytes: FloatArray
    transient_bytes: FloatArray
    shared_bytes: FloatArray
    layout: IntArray
    of_option: IntArray

    def __len__(self) -> int:
        return len(self.width)


@dataclass(frozen=True, eq=False)
class MoveTable:
    """Least reallocation seconds of two shapes over their places: [shapes of trainer, shapes of consumer].

    anywhere_s: on any two meshes; apart_s: on two different meshes or with different layouts.
    """

    anywhere_s: FloatArray
    apart_s: FloatArray


def shapes_of(problem: Problem, call: int) -> Shapes:
    """The shapes of a call's options."""
    o = problem.options[call]
    columns = [o.width, o.time_s, o.resident_bytes, o.transient_bytes, o.shared_bytes, o.layout]
    rows, of_option = np.unique(np.stack(columns, axis=1).astype(np.float64), axis=0, return_inverse=True)
    width, layout = rows[:, 0].astype(np.int64), rows[:, 5].astype(np.int64)
    return Shapes(width, rows[:, 1], rows[:, 2], rows[:, 3], rows[:, 4], layout, of_option.reshape(-1))


def _least(seconds: FloatArray, rows: Shapes, columns: Shapes) -> FloatArray:
    """Minimum of `seconds` over the options of each pair of shapes."""
    by_row = np.full((len(rows), seconds.shape[1]), np.inf)
    np.minimum.at(by_row, rows.of_option, seconds)
    least = np.full((len(columns), len(rows)), np.inf)
    np.minimum.at(least, columns.of_option, by_row.T)
    return least.T


def move_table(problem: Problem, u: int, v: int, rows: Shapes, columns: Shapes) -> MoveTable:
    """Reallocation between the shapes of trainer u and consumer v."""
    seconds, a, b = problem.moves[u, v], problem.options[u], problem.options[v]
    together = (a.first[:, None] == b.first) & (a.width[:, None] == b.width) & (a.layout[:, None] == b.layout)
    anywhere = _least(seconds, rows, columns)
    apart = _least(np.where(together, np.inf, seconds), rows, columns)
    return MoveTable(anywhere, np.where(np.isinf(apart), anywhere, apart))


def gpu_unit(problem: Problem) -> int:
    """The largest step of the GPU axis that every mesh begins and ends on."""
    return math.gcd(problem.gpus, *(int(x) for o in problem.options for x in {*o.first.tolist(), *o.width.tolist()}))
