"""A lower bound of the period from linear inequalities, and for every option the bound of the plans that have it.

Every plan has, with seconds t and area a = t x width / GPUs of its options, in every period T:

* T >= sum of all areas (reallocation included), because GPUs are exclusive;
* T x distance >= the times along a cycle of dependencies. Between the end of call u and the start of call w of the
  same iteration run all calls that need u and that w needs: such a *window* is at least as long as their areas;
* a reallocation counts only where no other call can have made the same copy;
* memory: over all GPUs, what is resident and the transient bytes of any one call fit.

Each is a sum over calls, so any weighting of them by weights >= 0 (those of T adding up to one) bounds T by the sum of
each call's least term (Lagrangian relaxation). A linear program gives the best weights; the bound does not depend on
how exactly it is solved. Where one option's term lies above its call's least, so does the bound for plans with it
(reduced cost).
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from ortools.linear_solver.python import model_builder

from planner.search.problem import FloatArray, IntArray, SearchProblem

MAX_CYCLES = 200
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Window:
    """Calls `inside` run between the end of `source` and the start of `target` of the same iteration."""

    source: int
    target: int
    inside: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Relaxation:
    """No plan has a shorter period than `bound_s`, and none with option i of call c one below `option_s[c][i]`."""

    bound_s: float
    option_s: tuple[FloatArray, ...]

    def within(self, period_s: float) -> tuple[IntArray, ...]:
        """Options of every call that plans of period `period_s` or shorter can have."""
        return tuple(np.flatnonzero(bound_s <= period_s) for bound_s in self.option_s)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Inequalities sum over calls of terms[c][option, row] <= T; from row `timed` on, <= 1."""

    terms: tuple[FloatArray, ...]
    timed: int


def windows(problem: SearchProblem) -> list[Window]:
    """All windows that two or more calls share; with one call inside, its own time says more."""
    graph: nx.DiGraph[int] = nx.DiGraph((e.source, e.target) for e in problem.edges if e.distance == 0)
    found = []
    after: dict[int, set[int]] = {call: nx.descendants(graph, call) for call in sorted(graph)}
    for source in after:
        for target in sorted(after[source]):
            inside = tuple(sorted(call for call in after[source] if target in after[call]))
            if len(inside) > 1:
                found.append(Window(source, target, inside))
    return found


def least_distance(problem: SearchProblem, u: int, v: int) -> int:
    """Of several dependencies u -> v the least distance, which is that of the one that binds."""
    return min(e.distance for e in problem.edges if (e.source, e.target) == (u, v))


def cycles(problem: SearchProblem, through: list[Window]) -> list[list[int]]:
    """Simple cycles of dependencies as lists of calls; number n_calls + k stands for the window k between two calls."""
    graph: nx.DiGraph[int] = nx.DiGraph((e.source, e.target) for e in problem.edges if e.source != e.target)
    for k, window in enumerate(through):
        nx.add_path(graph, (window.source, problem.n_calls + k, window.target))
    found = []
    for nodes in nx.simple_cycles(graph):
        found.append(nodes)
        if len(found) == MAX_CYCLES:
            break
    return found


def _cycle_row(
    problem: SearchProblem, nodes: list[int], through: list[Window], area: list[FloatArray], move: list[FloatArray]
) -> list[FloatArray]:
    """Terms of each call in one period of a cycle."""
    n = problem.n_calls
    terms = [np.zeros(len(options)) for options in problem.options]
    length = 0
    for u, v in zip(nodes, [*nodes[1:], nodes[0]], strict=True):
        if u >= n:
            continue
        terms[u] += problem.options[u].time_s
        if v >= n:
            for call in through[v - n].inside:
                terms[call] += area[call]
            continue
        distance = least_distance(problem, u, v)
        length += distance
        if distance and (u, v) in problem.moves:
            terms[v] += move[v]
    return [term / max(1, length) for term in terms]


def _memory_rows(problem: SearchProblem) -> list[list[FloatArray]]:
    """Bytes of all GPUs as parts of what there is, with the transient bytes of one call at a time."""
    whole = problem.gpus * problem.capacity_bytes
    resident = [o.width * o.resident_bytes / whole for o in problem.options]
    transient = [o.width * (o.transient_bytes - o.shared_bytes) / whole for o in problem.options]
    return [
        [resident[c] + transient[c] if c == running else resident[c] for c in range(problem.n_calls)]
        for running in range(problem.n_calls)
    ]


def may_share(problem: SearchProblem, v: int) -> NDArray[np.bool_]:
    """Which options of consumer v another consumer may have made the copy for, so that no move comes before them."""
    own = problem.options[v]
    found = np.zeros(len(own), bool)
    for w in problem.earlier_readers[v]:
        other = problem.options[w]
        keys = set(zip(other.first.tolist(), other.width.tolist(), other.layout.tolist(), strict=True))
        mine = zip(own.first.tolist(), own.width.tolist(), own.layout.tolist(), strict=True)
        found |= np.fromiter((key in keys for key in mine), bool, len(own))
    return found


def _rows(problem: SearchProblem) -> _Rows:
    area = [o.time_s * o.width / problem.gpus for o in problem.options]
    move = [np.zeros(len(o)) for o in problem.options]
    for (_, v), moves in problem.moves.items():
        move[v] = np.where(may_share(problem, v), 0.0, moves.least_into())
    through = windows(problem)
    rows = [[a + m * o.width / problem.gpus for a, m, o in zip(area, move, problem.options, strict=True)]]
    for call in range(problem.n_calls):
        alone = [np.zeros(len(options)) for options in problem.options]
        alone[call] = problem.options[call].time_s
        rows.append(alone)
    rows += [_cycle_row(problem, nodes, through, area, move) for nodes in cycles(problem, through)]
    timed = len(rows)
    rows += _memory_rows(problem)
    terms = tuple(np.stack([row[call] for row in rows], axis=1) for call in range(problem.n_calls))
    return _Rows(terms, timed)


def _weights(rows: _Rows) -> FloatArray:
    """Weights of the rows: duals of the linear program over mixtures of options; the area alone where it has none."""
    model = model_builder.Model()
    period = model.new_num_var(0.0, np.inf, "period")
    share = []
    for terms in rows.terms:
        distinct = np.unique(terms.round(9), axis=0)
        share.append(([model.new_num_var(0.0, np.inf, "") for _ in distinct], distinct))
        model.add(sum(share[-1][0]) == 1)
    total = [
        sum(model_builder.LinearExpr.weighted_sum(shares, terms[:, row].tolist()) for shares, terms in share)
        for row in range(rows.terms[0].shape[1])
    ]
    added = [model.add(sums <= (period if row < rows.timed else 1.0)) for row, sums in enumerate(total)]
    model.minimize(period)
    solver = model_builder.Solver("GLOP")
    alone = np.eye(1, len(added)).reshape(-1)
    if solver.solve(model) != model_builder.SolveStatus.OPTIMAL:
        return alone
    weights = np.maximum(0.0, [-solver.dual_value(row) for row in added])
    timed = weights[: rows.timed].sum()
    return weights / timed if timed > 0 else alone


def relax(problem: SearchProblem) -> Relaxation:
    """The bounds of a problem."""
    rows = _rows(problem)
    weights = _weights(rows)
    value = [terms @ weights for terms in rows.terms]
    bound_s = sum(float(v.min()) for v in value) - float(weights[rows.timed :].sum())
    bound_s -= ROUNDING * abs(bound_s)
    return Relaxation(max(0.0, bound_s), tuple(bound_s + (v - v.min()) * (1 - ROUNDING) for v in value))
