"""What the compiled loops of `planner.search.kernels` read and write: a problem as arrays, and their working memory."""

from __future__ import annotations

from typing import NamedTuple

from planner.search.problem import FloatArray, IntArray


class Tables(NamedTuple):
    """A problem as arrays; option i of call c is row `call[c, OFFSET] + i` of option and price.

    Edges are sorted by target, those into call c are the rows `call[c, EDGES]` up to `call[c, EDGES_END]`. `ranked`
    lists a call's options sorted by mesh or layout id and time, `starts` [2, n, ids + 1] where each id begins there.
    A call's reallocation is `moves[move_row[its trainer's option] + option[its own option, COLUMN]]`.
    """

    option: IntArray
    price: FloatArray
    call: IntArray
    edge: IntArray
    turn: IntArray  # columns as in edge
    moves: FloatArray  # [layouts of trainer u, layouts of consumer v] flattened, for all v one after another
    move_row: IntArray  # [n_options(u)] where the row of each option of u begins in `moves`, at ROW_OFFSET of v
    ranked: IntArray
    starts: IntArray
    capacity: float


class Scratch(NamedTuple):
    """Working arrays of one thread, for n calls and 2n nodes.

    node [5, 2n]: nodes in order of a period; position of each call in the order; bits of the calls whose meshes a
    node's meshes meet; bits of the calls whose meshes it holds; how many nodes it waits for. wait [2n, k, 2]: those
    nodes, and how many periods earlier.
    """

    node: IntArray
    wait: IntArray
    duration: FloatArray  # [2n]
    ends: FloatArray  # [PERIODS + deepest, 2n]
    tried: IntArray  # [3, n]
