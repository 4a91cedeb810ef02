"""Is there a plan with a given period? A CP-SAT model of a cyclic schedule on the GPU axis x time, for a fixed period.

A plan of period T repeats: every call c starts at s_c + p T for all p. With T fixed, s_c = f_c + k_c T with f_c in
[0, T) and an integer k_c, and GPUs are exclusive if the rectangles at f_c and f_c + T do not overlap, however many
periods the calls of one iteration span. A plan of period T' < T can be stretched to T, so "no plan of period T" is a
lower bound T for `planner.search.schedule`.

Relaxations; each can only let in more plans, so an infeasible model is a proof:

* times are rounded down to `unit_s`;
* a move holds the mesh of its call, not that of the trainer, and its time is the least over the places of two shapes
  (on different meshes, or on the same one where copies are shared);
* the order of a plan and its bounded lags are not asked for; |k_c| is bounded by what any plan can be brought to;
* bytes are rounded down to 2^-16 of the capacity.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from ortools.sat.python import cp_model

from planner.search.problem import FloatArray, SearchProblem
from planner.search.relaxation import Relaxation, Window, cycles, least_distance, windows
from planner.search.shapes import MoveTable, Shapes, gpu_unit, move_table, shapes_of

BYTES_STEPS = 1 << 16


@dataclass(frozen=True, eq=False)
class Frame:
    """A problem prepared once for models of several periods."""

    problem: SearchProblem
    shapes: tuple[Shapes, ...]
    moves: dict[tuple[int, int], MoveTable]
    cycles: tuple[tuple[tuple[int, int], ...], ...]  # simple cycles of dependencies, as edges (u, v)
    windows: tuple[Window, ...]
    unit: int

    @classmethod
    def of(cls, problem: SearchProblem) -> Frame:
        """Shapes, reallocation between them, and the cycles of the dependency graph."""
        shapes = tuple(shapes_of(problem, call) for call in range(problem.n_calls))
        moves = {(u, v): move_table(problem, u, v, shapes[u], shapes[v]) for u, v in problem.moves}
        found = tuple(tuple(zip(c, (*c[1:], c[0]), strict=True)) for c in cycles(problem, []))
        return cls(problem, shapes, moves, found, tuple(windows(problem)), gpu_unit(problem))

    def within(self, relaxed: Relaxation, period_s: float) -> Frame | None:
        """Only the shapes that plans of a period can have; None where that leaves a call nothing."""
        keep = [
            np.array([s for s, members in enumerate(shapes.members) if bounds[members].min() <= period_s], np.int64)
            for shapes, bounds in zip(self.shapes, relaxed.option_s, strict=True)
        ]
        if not all(map(len, keep)):
            return None
        moves = {
            (u, v): MoveTable(table.anywhere_s[np.ix_(keep[u], keep[v])], table.apart_s[np.ix_(keep[u], keep[v])])
            for (u, v), table in self.moves.items()
        }
        shapes = tuple(shapes.take(kept) for shapes, kept in zip(self.shapes, keep, strict=True))
        return replace(self, shapes=shapes, moves=moves)


@dataclass(eq=False)
class CyclicModel:
    """The variables of one model; times in units of `unit_s`, widths and places in `frame.unit`s."""

    frame: Frame
    period: int
    unit_s: float
    cp: cp_model.CpModel = field(default_factory=cp_model.CpModel)
    picks: list[list[cp_model.IntVar]] = field(default_factory=list)
    duration: list[cp_model.IntVar] = field(default_factory=list)
    width: list[cp_model.IntVar] = field(default_factory=list)
    move: list[cp_model.LinearExprT] = field(default_factory=list)
    start: list[cp_model.IntVar] = field(default_factory=list)
    end: list[cp_model.IntVar] = field(default_factory=list)
    turn: list[cp_model.IntVar] = field(default_factory=list)
    place: list[cp_model.IntVar] = field(default_factory=list)
    span: list[cp_model.IntervalVar] = field(default_factory=list)
    together: dict[tuple[int, int], cp_model.IntVar] = field(default_factory=dict)
    borrows: dict[int, cp_model.IntVar] = field(default_factory=dict)
    lends: dict[tuple[int, int], cp_model.IntVar] = field(default_factory=dict)

    def ticks(self, seconds: float) -> int:
        """Seconds rounded down to the model's time."""
        return int(seconds / self.unit_s * (1 - 1e-12))

    def chosen(self, call: int, values: list[int]) -> cp_model.IntVar:
        """The value of the call's shape."""
        variable = self.cp.new_int_var_from_domain(cp_model.Domain.from_values(values), "")
        self.cp.add(variable == _chosen(self.picks[call], values))
        return variable


def _chosen(picks: list[cp_model.IntVar], values: list[int]) -> cp_model.LinearExprT:
    return cp_model.LinearExpr.weighted_sum(picks, values)


def _add_calls(m: CyclicModel) -> None:
    """Shape, start and turn of every call."""
    problem = m.frame.problem
    turns = problem.n_calls * (2 + problem.most_lag)
    for call, shapes in enumerate(m.frame.shapes):
        picks = [m.cp.new_bool_var(f"shape{call}.{s}") for s in range(len(shapes))]
        m.cp.add_exactly_one(picks)
        m.picks.append(picks)
        ticks = [m.ticks(float(t)) for t in shapes.time_s]
        for pick, duration in zip(picks, ticks, strict=True):
            if duration > m.period:
                m.cp.add(pick == 0)
        m.duration.append(m.chosen(call, ticks))
        m.width.append(m.chosen(call, [int(w) // m.frame.unit for w in shapes.width]))
        m.start.append(m.cp.new_int_var(0, m.period - 1 if call else 0, f"start{call}"))
        m.end.append(m.cp.new_int_var(0, 2 * m.period, f"end{call}"))
        m.turn.append(m.cp.new_int_var(-turns if call else 0, turns if call else 0, f"turn{call}"))


def _add_borrowing(m: CyclicModel) -> None:
    """Which consumers read a copy that another one has made: one of the same width, layout and place, and never all
    consumers of a version."""
    problem = m.frame.problem
    for v, readers in problem.earlier_readers.items():
        if not readers:
            continue
        m.borrows[v] = m.cp.new_bool_var(f"borrows{v}")
        lenders = []
        for w in readers:
            same = m.cp.new_bool_var("")
            own, other = m.frame.shapes[v], m.frame.shapes[w]
            for i, pick in enumerate(m.picks[v]):
                alike = (other.layout == own.layout[i]) & (other.width == own.width[i])
                m.cp.add_bool_or([m.picks[w][j] for j in np.flatnonzero(alike)]).only_enforce_if(same, pick)
            m.lends[v, w] = same
            lenders.append(same)
        m.cp.add_bool_or(lenders).only_enforce_if(m.borrows[v])
    for v, readers in problem.earlier_readers.items():
        if v in m.borrows and all(w in m.borrows for w in readers):
            m.cp.add_bool_or([m.borrows[w].negated() for w in (v, *readers)])


def _add_moves(m: CyclicModel) -> None:
    """Reallocation before each consumer, pair by pair of shapes."""
    m.move.extend(0 for _ in m.frame.shapes)
    for (u, v), table in m.frame.moves.items():
        m.move[v] = m.cp.new_int_var(0, m.period, f"move{v}")
        m.together[u, v] = together = m.cp.new_bool_var(f"together{v}")
        consumer, trainer = m.frame.shapes[v], m.frame.shapes[u]
        for i, pick in enumerate(m.picks[u]):
            alike = (consumer.layout == trainer.layout[i]) & (consumer.width == trainer.width[i])
            m.cp.add_bool_or([m.picks[v][j] for j in np.flatnonzero(alike)]).only_enforce_if(together, pick)
        unless = [m.borrows[v].negated()] if v in m.borrows else []
        _add_move_times(m, u, v, table.anywhere_s, unless)
        _add_move_times(m, u, v, table.apart_s, [together.negated(), *unless])


def _add_move_times(m: CyclicModel, u: int, v: int, seconds: FloatArray, enforced: list[cp_model.IntVar]) -> None:
    """The move before v takes the time of the shapes chosen; shapes of u with equal times are one condition."""
    ticks = (seconds / m.unit_s * (1 - 1e-12)).astype(np.int64)
    rows, of_shape = np.unique(ticks, axis=0, return_inverse=True)
    of_shape = of_shape.reshape(-1)
    for k, row in enumerate(rows):
        if not row.any():
            continue
        members = [m.picks[u][i] for i in np.flatnonzero(of_shape == k)]
        condition = members[0]
        if len(members) > 1:
            condition = m.cp.new_bool_var("")
            for pick in members:
                m.cp.add_implication(pick, condition)
        m.cp.add(m.move[v] >= _chosen(m.picks[v], row.tolist())).only_enforce_if(condition, *enforced)


def _add_dependencies(m: CyclicModel) -> None:
    """Edges between starts and ends, weights taken before they are newer, and what every cycle of edges needs in a
    period. Where nothing moves, a copy may have been taken before, or the weights are read where the training is."""
    for e in m.frame.problem.edges:
        if e.source == e.target:
            continue
        begin = m.start[e.target] + (m.turn[e.target] + e.distance - m.turn[e.source]) * m.period
        if (e.source, e.target) not in m.frame.moves or e.distance == 0:
            begin = begin + m.move[e.target]
        m.cp.add(begin >= m.end[e.source])
    for e in m.frame.problem.turns:
        moves = m.cp.new_bool_var("")
        m.cp.add(m.move[e.source] == 0).only_enforce_if(moves.negated())
        after = m.start[e.target] + (m.turn[e.target] + e.distance - m.turn[e.source]) * m.period
        m.cp.add(after >= m.start[e.source] + m.move[e.source]).only_enforce_if(moves)
    for cycle in m.frame.cycles:
        distance = [least_distance(m.frame.problem, u, v) for u, v in cycle]
        moves = [m.move[v] for (u, v), d in zip(cycle, distance, strict=True) if d > 0 and (u, v) in m.frame.moves]
        m.cp.add(sum(m.duration[u] for u, _ in cycle) + sum(moves) <= m.period * sum(distance))


def _copies(m: CyclicModel, call: int) -> list[cp_model.IntervalVar]:
    """The time a call holds its mesh, now and one period later."""
    size = m.cp.new_int_var(0, m.period, "")
    m.cp.add(size == m.move[call] + m.duration[call])
    start, end = m.start[call], m.end[call]
    return [m.cp.new_interval_var(start + shift, size, end + shift, "") for shift in (0, m.period)]


def _add_gpus(m: CyclicModel) -> None:
    """Exclusive GPUs; and, implied by it, GPUs in use at any time and over the whole period."""
    capacity = m.frame.problem.gpus // m.frame.unit
    intervals = [interval for call in range(len(m.picks)) for interval in _copies(m, call)]
    m.cp.add_no_overlap_2d([span for span in m.span for _ in range(2)], intervals)
    m.cp.add_cumulative(intervals, [width for width in m.width for _ in range(2)], capacity)
    area = [
        _chosen(picks, [int(w) // m.frame.unit * m.ticks(float(t)) for w, t in zip(s.width, s.time_s, strict=True)])
        for picks, s in zip(m.picks, m.frame.shapes, strict=True)
    ]
    m.cp.add(sum(area) <= capacity * m.period)
    for window in m.frame.windows:
        u, w = window.source, window.target
        free = m.start[w] + m.move[w] + (m.turn[w] - m.turn[u]) * m.period - m.end[u]
        m.cp.add(sum(area[call] for call in window.inside) <= capacity * free)


def _add_places(m: CyclicModel) -> None:
    """Where each call's mesh begins, among the places of its shape."""
    for call, shapes in enumerate(m.frame.shapes):
        first = m.frame.problem.options[call].first // m.frame.unit
        places = [sorted(set(first[members].tolist())) for members in shapes.members]
        place = m.cp.new_int_var_from_domain(
            cp_model.Domain.from_values(sorted({x for some in places for x in some})), f"place{call}"
        )
        m.place.append(place)
        beyond = m.cp.new_int_var(1, m.frame.problem.gpus // m.frame.unit, "")
        m.span.append(m.cp.new_interval_var(place, m.width[call], beyond, f"mesh{call}"))
        for pick, allowed in zip(m.picks[call], places, strict=True):
            domain = cp_model.Domain.from_values(allowed)
            m.cp.add_linear_expression_in_domain(place, domain).only_enforce_if(pick)
    for (u, v), same in (*m.together.items(), *m.lends.items()):
        m.cp.add(m.place[u] == m.place[v]).only_enforce_if(same)
    for call, leader in enumerate(m.frame.problem.leader):
        if call != leader:
            m.cp.add(m.place[call] == m.place[leader])
            m.cp.add(m.width[call] == m.width[leader])


def _steps(m: CyclicModel, size: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> list[int]:
    return [int(x) for x in np.floor(size / m.frame.problem.capacity_bytes * BYTES_STEPS)]


def _add_memory(m: CyclicModel) -> None:
    """On every mesh: what is resident, and the transient bytes of one call at a time."""
    n = len(m.picks)
    resident = [m.chosen(c, _steps(m, s.resident_bytes)) for c, s in enumerate(m.frame.shapes)]
    sharing = {v: same for (_, v), same in m.together.items()}
    for call, shapes in enumerate(m.frame.shapes):
        peak = m.cp.new_int_var(0, BYTES_STEPS, "")
        alone = _chosen(m.picks[call], _steps(m, shapes.resident_bytes + shapes.transient_bytes))
        enforced = [sharing[call].negated()] if call in sharing else []
        m.cp.add(peak >= alone).only_enforce_if(*enforced)
        shared = _steps(m, shapes.resident_bytes + shapes.transient_bytes - shapes.shared_bytes)
        m.cp.add(peak >= _chosen(m.picks[call], shared))
        demands = [peak if c == call else resident[c] for c in range(n)]
        m.cp.add_cumulative(m.span, demands, BYTES_STEPS)


def model(frame: Frame, period: int, unit_s: float) -> CyclicModel:
    """A model that is feasible if there is a plan of period at most `period` x `unit_s` seconds."""
    m = CyclicModel(frame, period, unit_s)
    _add_calls(m)
    _add_borrowing(m)
    _add_moves(m)
    _add_dependencies(m)
    _add_places(m)
    _add_memory(m)
    _add_gpus(m)
    return m
