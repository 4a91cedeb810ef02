"""What a decision costs: the semantics that the search, its bound and the simulation of a plan share.

Periods p = 0, 1, 2, ... run every call in the decision's order, call c for iteration p - lag[c] (nothing where that is
negative). Before a call that reads a trained model's weights from another layout stands its *move*: it starts when all
GPUs of the trainer's and of the call's mesh are free and the trainer's version is there, and holds both meshes. Calls
that read the same version with equal lags, meshes and layouts share a copy, which the first of them makes. A call
starts when the GPUs of its mesh are free and every source of an edge into it has ended (edges from iterations before
the first are met). An order and lags are legal when every edge u -> v has (lag[u] - distance, position[u]) before
(lag[v], position[v]); edges from a call to itself always hold. So it is with *turns*, for which nothing waits: a call
takes the weights that it should read before a training makes newer ones, exactly as many iterations old as its edge
says. Calls that must share a mesh do.

The period is the growth of the ends per period in the long run, the latency the time of one iteration alone. A GPU's
memory is the resident bytes of all calls on it and the largest transient bytes of one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.search import kernels
from planner.search.arrays import Scratch, Tables
from planner.search.problem import Decision, Dependency, FloatArray, IntArray, Options, SearchProblem


@dataclass(frozen=True, slots=True)
class Cost:
    """A decision's cost; `overflow_bytes` is zero where it fits."""

    period_s: float
    latency_s: float
    overflow_bytes: float

    @property
    def objective_s(self) -> float:
        """What the search minimises among decisions that fit: the period, ties broken by the latency."""
        return self.period_s + kernels.LATENCY_WEIGHT * self.latency_s


def _groups(offset: IntArray, ids: IntArray, time_s: FloatArray, n_ids: int) -> tuple[IntArray, IntArray]:
    """Options of each call sorted by id and time, and where each id starts: [n, n_ids + 1]."""
    n = len(offset) - 1
    ranked, starts = np.empty_like(ids), np.zeros((n, n_ids + 1), np.int64)
    for c in range(n):
        rows = ids[offset[c] : offset[c + 1]]
        ranked[offset[c] : offset[c + 1]] = np.lexsort((time_s[offset[c] : offset[c + 1]], rows))
        starts[c] = np.searchsorted(np.sort(rows), np.arange(n_ids + 1))
    return ranked, starts


def _dense(ids: IntArray) -> IntArray:
    return np.unique(ids, return_inverse=True)[1].astype(np.int64).reshape(-1)


def _sorted_edges(problem: SearchProblem) -> list[Dependency]:
    return sorted(problem.edges, key=lambda e: (e.target, e.source, e.distance))


def _call_rows(problem: SearchProblem, offset: IntArray) -> IntArray:
    """Tables.call."""
    rows, at = [], 0
    for c, options in enumerate(problem.options):
        u = problem.trainer.get(c, -1)
        into = np.searchsorted([e.target for e in _sorted_edges(problem)], [c, c + 1])
        rows.append((offset[c], len(options), u, at, *into, problem.leader[c], problem.version.get(c, 0)))
        at += len(problem.options[u]) if u >= 0 else 0
    return np.array(rows, np.int64)


def _flat_moves(problem: SearchProblem) -> tuple[FloatArray, IntArray, IntArray]:
    """Tables.moves and Tables.move_row, and the column of every option of every call."""
    flat, begins, columns, at = [np.zeros(1)], [np.zeros(0, np.int64)], [], 1
    for c, options in enumerate(problem.options):
        u = problem.trainer.get(c, -1)
        if u < 0:
            columns.append(np.zeros(len(options), np.int64))
            continue
        moves = problem.moves[u, c]
        flat.append(moves.seconds.ravel())
        begins.append(at + moves.row * moves.seconds.shape[1])
        columns.append(moves.column)
        at += moves.seconds.size
    return np.concatenate(flat), np.concatenate(begins), np.concatenate(columns)


def tables(problem: SearchProblem) -> Tables:
    """The problem as the flat arrays that the kernels read."""
    options = problem.options
    offset = np.cumsum([0, *map(len, options)], dtype=np.int64)
    first, width = np.concatenate([o.first for o in options]), np.concatenate([o.width for o in options])
    mesh = _dense(first * (problem.gpus + 1) + width)
    layout = _dense(np.concatenate([o.layout for o in options]))
    n_ids = 1 + int(max(mesh.max(), layout.max()))
    time_s = np.concatenate([o.time_s for o in options])
    by_mesh, by_layout = (_groups(offset, ids, time_s, n_ids) for ids in (mesh, layout))
    prices = [(o.time_s, o.resident_bytes, o.transient_bytes, o.shared_bytes) for o in options]
    moves, move_row, column = _flat_moves(problem)
    edges = _sorted_edges(problem)
    return Tables(
        option=np.ascontiguousarray(np.stack([first, width, mesh, layout, column], axis=1)),
        price=np.ascontiguousarray(np.concatenate([np.stack(columns, axis=1) for columns in prices])),
        call=_call_rows(problem, offset),
        edge=np.array([(e.source, e.target, e.distance) for e in edges], np.int64).reshape(-1, 3),
        turn=np.array([(e.source, e.target, e.distance) for e in problem.turns], np.int64).reshape(-1, 3),
        moves=moves,
        move_row=move_row,
        ranked=np.stack([by_mesh[0], by_layout[0]]),
        starts=np.stack([by_mesh[1], by_layout[1]]),
        capacity=float(problem.capacity_bytes),
    )


def scratch(t: Tables) -> Scratch:
    """Working arrays for one thread."""
    n = len(t.call)
    waits = 2 * n + len(t.edge)
    deepest = 2 - int(t.turn[:, kernels.DISTANCE].min(initial=0)) + int(t.edge[:, kernels.DISTANCE].max(initial=0))
    return Scratch(
        node=np.zeros((5, 2 * n), np.int64),
        wait=np.zeros((2 * n, waits, 2), np.int64),
        duration=np.zeros(2 * n),
        ends=np.zeros((kernels.PERIODS + deepest, 2 * n)),
        tried=np.zeros((3, n), np.int64),
    )


def rows(decision: Decision) -> IntArray:
    """The decision as the kernels read it: [3, n] choice, order, lag."""
    return np.array([decision.choice, decision.order, decision.lag], np.int64)


def _measured(t: Tables, decision: Decision) -> FloatArray:
    x, costs = rows(decision), np.full(5, np.nan)
    kernels.metropolis(t, scratch(t), x, x.copy(), np.ones(4, np.int64), costs, 1.0, 0)
    return costs


def compile_kernels() -> None:
    """Compile the inner loops or load them from disk, so that no clock runs meanwhile."""
    whole, part = np.ones(1, np.int64), np.ones(1)
    options = Options(
        first=0 * whole, width=whole, time_s=part, resident_bytes=part, transient_bytes=part, layout=0 * whole
    )
    problem = SearchProblem(gpus=1, capacity_bytes=2.0, names=("",), options=(options,), edges=())
    evaluate(tables(problem), problem.plain((0,)))


def is_legal(problem: SearchProblem, decision: Decision) -> bool:
    """Whether the decision's order and lags respect every edge, and calls share their meshes as they must."""
    position = {call: k for k, call in enumerate(decision.order)}
    lag = decision.lag
    in_order = sorted(decision.order) == list(range(problem.n_calls)) and all(
        (lag[e.source] - e.distance, position[e.source]) < (lag[e.target], position[e.target])
        for e in (*problem.edges, *problem.turns)
        if e.source != e.target
    )
    return in_order and problem.keeps_meshes(decision.choice)


def evaluate(t: Tables, decision: Decision) -> Cost:
    """Cost of a legal decision."""
    costs = _measured(t, decision)
    assert not np.isnan(costs[kernels.PRESENT]), f"illegal order {decision.order} with lags {decision.lag}"
    return Cost(*(float(costs[k]) for k in (kernels.PERIOD, kernels.LATENCY, kernels.OVERFLOW)))


def cost(problem: SearchProblem, decision: Decision) -> Cost:
    """Cost of one legal decision, without tables of all options."""
    alone = problem.restrict(tuple(np.array([option], np.int64) for option in decision.choice))
    return evaluate(tables(alone), Decision(problem.n_calls * (0,), decision.order, decision.lag))
