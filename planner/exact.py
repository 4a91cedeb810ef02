"""Search with a proof: the shortest period for which `planner.cyclic` cannot rule out a plan.

Periods are tried from the top: a model that is infeasible raises the bound, a feasible one gives a plan, which is
costed by `planner.schedule`. The bound holds for the period of any order and lag, not for the tie-break by latency.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from ortools.sat.python import cp_model

from planner import cyclic, mcmc, schedule
from planner.kernels import Tables
from planner.problem import Decision, Problem
from plans.errors import Infeasible

TICKS = 1 << 14  # time steps in the first plan's period: rounding costs the bound less than 0.1 %
TOLERANCE = 1e-3
FIRST_STEP = 0.01
POLISH_EVALUATIONS = 20_000


class Status(StrEnum):
    """Whether the gap was closed to the tolerance."""

    PROVED = "proved"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Proved:
    """The best decision, and a period that no plan of the problem can beat."""

    decision: Decision
    period_s: float
    latency_s: float
    bound_s: float
    status: Status
    seconds: float

    @property
    def gap(self) -> float:
        """How much shorter the best period could be, as a part of this one."""
        return max(0.0, 1.0 - self.bound_s / self.period_s)


@dataclass(frozen=True)
class _Range:
    """Where the best period can be: above `bound_s`; `best` is the plan so far, `open_s` the least feasible model.

    step: how far below the top the next period to try lies, as a part of it; it doubles while models are feasible.
    """

    bound_s: float
    open_s: float
    best: mcmc.Found | None
    step: float

    @property
    def top_s(self) -> float:
        """The least period that needs no model any more."""
        return min(self.open_s, self.best.period_s if self.best else np.inf)

    @property
    def closed(self) -> bool:
        """Whether bound and top are within the tolerance, and the rounding of two periods to ticks."""
        return self.top_s - self.bound_s <= 1.25 * TOLERANCE * self.top_s

    @property
    def target_s(self) -> float:
        """The next period to try."""
        return self.top_s if self.best is None else max(self.top_s * (1 - self.step), (self.bound_s + self.top_s) / 2)

    def after(self, period_s: float, feasible: bool, found: mcmc.Found | None) -> _Range:
        """The range once the model of `period_s` is decided, with the plan that came of it."""
        if not feasible:
            return replace(self, bound_s=max(self.bound_s, period_s), step=TOLERANCE)
        best = min((f for f in (self.best, found) if f), key=lambda f: f.objective_s, default=None)
        return replace(self, open_s=min(self.open_s, period_s), best=best, step=min(0.5, 2 * self.step))

    def answer(self, seconds: float) -> Proved:
        """The plan so far with the bound."""
        assert self.best is not None
        proved = self.best.period_s - self.bound_s <= 1.25 * TOLERANCE * self.best.period_s
        status = Status.PROVED if proved else Status.STOPPED
        bound = min(self.bound_s, self.best.period_s)
        return Proved(self.best.decision, self.best.period_s, self.best.latency_s, bound, status, seconds)


def decode(solver: cp_model.CpSolver, m: cyclic.Model) -> list[Decision]:
    """Decisions of a solution: its options with the order and lags at every place where the period can be cut."""
    problem, n = m.frame.problem, m.frame.problem.n_calls
    shape = [next(s for s, pick in enumerate(picks) if solver.value(pick)) for picks in m.picks]
    choice = []
    for call, options in enumerate(problem.options):
        first = solver.value(m.place[call]) * m.frame.unit
        fits = (m.frame.shapes[call].of_option == shape[call]) & (options.first == first)
        choice.append(int(np.flatnonzero(fits)[0]))
    start = [solver.value(m.start[c]) + solver.value(m.turn[c]) * m.period for c in range(n)]
    decisions = [Decision.plain(tuple(choice))]
    for cut in {s % m.period for s in start}:
        turn = [(s - cut) // m.period for s in start]
        order = sorted(range(n), key=lambda c: ((start[c] - cut) % m.period, c))
        lag = [t - min(turn) for t in turn]
        decision = Decision(tuple(choice), tuple(order), tuple(lag))
        if max(lag) <= 1 and schedule.is_legal(problem, decision):
            decisions.append(decision)
    return decisions


def _polished(t: Tables, problem: Problem, decisions: list[Decision], seed: int, seconds: float) -> mcmc.Found | None:
    """The best of the decisions after a short walk; None where memory rounding let in one that does not fit."""
    best = min(decisions, key=lambda d: schedule.evaluate(t, d).objective_s)
    found = mcmc.search(problem, seed=seed, evaluations=POLISH_EVALUATIONS, seconds=seconds, start=best)
    return found if isinstance(found, mcmc.Found) else None


def _solver(seconds: float, seed: int, workers: int) -> cp_model.CpSolver:
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = max(seconds, 0.01)
    solver.parameters.num_workers = workers
    solver.parameters.random_seed = seed
    solver.parameters.interleave_search = True  # the same answer whatever the machine is doing
    return solver


def search(
    problem: Problem,
    *,
    seconds: float,
    seed: int = 0,
    workers: int = 1,
    hint: Decision | None = None,
    progress: Callable[[Proved], None] | None = None,
) -> Proved | Infeasible:
    """The best decision and a bound within about `seconds`, never worse than `hint`. Infeasible is proved."""
    began = time.monotonic()
    t, frame = schedule.tables(problem), cyclic.Frame.of(problem)
    first = hint or Decision.plain(tuple(int(options.time_s.argmin()) for options in problem.options))
    at = _Range(_shortest(frame), _longest(problem), _polished(t, problem, [first], seed, seconds), FIRST_STEP)
    unit_s = at.top_s / TICKS
    while not at.closed and (left := seconds - (time.monotonic() - began)) > 0:
        m = cyclic.model(frame, int(at.target_s / unit_s), unit_s)
        solver = _solver(left, seed, workers)
        status = solver.solve(m.cp)
        if status == cp_model.INFEASIBLE and at.best is None:
            return mcmc.overfull(problem, 0)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE, cp_model.INFEASIBLE):
            break
        feasible = status != cp_model.INFEASIBLE
        found = _polished(t, problem, decode(solver, m), seed, left) if feasible else None
        at = at.after(m.period * unit_s, feasible, found)
        if progress and at.best:
            progress(at.answer(time.monotonic() - began))
    return at.answer(time.monotonic() - began) if at.best else mcmc.overfull(problem, 0)


def _shortest(frame: cyclic.Frame) -> float:
    """A period that no plan beats: every call at its least area on all GPUs, every cycle at its least times."""
    area_s = sum(float((s.time_s * s.width).min()) for s in frame.shapes) / frame.problem.gpus
    quickest = [float(s.time_s.min()) for s in frame.shapes]
    cycles = (
        sum(quickest[u] for u, _ in cycle) / max(1, sum(frame.distance(u, v) for u, v in cycle))
        for cycle in frame.cycles
    )
    return max([area_s, *quickest, *cycles]) * (1 - 1e-9)


def _longest(problem: Problem) -> float:
    """A period that every plan stays below: all calls and moves one after another, each at its slowest."""
    moves = sum(float(seconds.max()) for seconds in problem.moves.values())
    delays = sum(e.delay_s for e in problem.edges)
    return moves + delays + sum(float(options.time_s.max()) for options in problem.options)
