"""Search with a proof: the shortest period for which `planner.search.cyclic` cannot rule out a plan.

The bound begins at `planner.search.relaxation`'s. Periods are tried from the top: a model that is infeasible raises
the bound, a feasible one gives a plan, which is costed by `planner.search.schedule`; one that is not decided in time
is followed by a shorter period. A model has only the options that the relaxation does not rule out for its period.
The bound holds for the period of any order and lag, not for the tie-break by latency.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from ortools.sat.python import cp_model

from planner.search import beginnings, cyclic, mcmc, schedule
from planner.search.arrays import Tables
from planner.search.problem import Decision, SearchProblem
from planner.search.relaxation import relax
from plans.errors import Infeasible

TICKS = 1 << 14  # time steps in the first plan's period: rounding costs the bound less than 0.1 %
GAP = 0.008
POLISH_EVALUATIONS = 20_000
SHARE = 0.4  # of the time that is left, for one model
LEAST_S = 2.0  # for the first model where there is no plan yet


class Outcome(StrEnum):
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
    status: Outcome
    seconds: float

    @property
    def gap(self) -> float:
        """How much shorter the best period could be, as a part of this one."""
        return max(0.0, 1.0 - self.bound_s / self.period_s)


@dataclass(frozen=True)
class _Range:
    """Where the best period can be: above `bound_s`; `best` is the plan so far, `open_s` the least feasible model.

    hard_s: the least period whose model was given up. step: how far below the top the next period to try lies, as a
    part of it; it doubles while models are feasible.
    """

    bound_s: float
    open_s: float
    best: mcmc.Walked | None
    gap: float
    step: float
    hard_s: float = np.inf

    @property
    def top_s(self) -> float:
        """The least period that needs no model any more."""
        return min(self.open_s, self.best.period_s if self.best else np.inf)

    @property
    def closed(self) -> bool:
        """Whether bound and top are within the gap, and the rounding of two periods to ticks."""
        return self.top_s - self.bound_s <= (self.gap + 2 / TICKS) * self.top_s

    @property
    def target_s(self) -> float:
        """The next period to try."""
        if self.best is None and self.hard_s == np.inf:
            return self.top_s
        middle = (self.bound_s + min(self.top_s, self.hard_s)) / 2
        return middle if self.hard_s < np.inf else max(self.top_s * (1 - self.step), middle)

    def after(self, period_s: float, feasible: bool, found: mcmc.Walked | None) -> _Range:
        """The range once the model of `period_s` is decided, with the plan that came of it."""
        if not feasible:
            return replace(self, bound_s=max(self.bound_s, period_s), step=self.gap)
        best = min((f for f in (self.best, found) if f), key=lambda f: f.objective_s, default=None)
        return replace(self, open_s=min(self.open_s, period_s), best=best, step=min(0.5, 2 * self.step))

    def answer(self, seconds: float) -> Proved:
        """The plan so far with the bound."""
        assert self.best is not None
        period_s = self.best.period_s
        proved = period_s - self.bound_s <= (self.gap + 2 / TICKS) * period_s
        status = Outcome.PROVED if proved else Outcome.STOPPED
        bound = min(self.bound_s, period_s)
        return Proved(self.best.decision, period_s, self.best.latency_s, bound, status, seconds)


def decode(solver: cp_model.CpSolver, m: cyclic.CyclicModel) -> list[Decision]:
    """Decisions of a solution: its options with the order and lags at every place where the period can be cut."""
    problem, n = m.frame.problem, m.frame.problem.n_calls
    shape = [next(s for s, pick in enumerate(picks) if solver.value(pick)) for picks in m.picks]
    choice = []
    for call, options in enumerate(problem.options):
        first = solver.value(m.place[call]) * m.frame.unit
        members = m.frame.shapes[call].members[shape[call]]
        choice.append(int(members[options.first[members] == first][0]))
    start = [solver.value(m.start[c]) + solver.value(m.turn[c]) * m.period for c in range(n)]
    decisions = [problem.plain(tuple(choice))]
    for cut in {s % m.period for s in start}:
        turn = [(s - cut) // m.period for s in start]
        order = sorted(range(n), key=lambda c: ((start[c] - cut) % m.period, c))
        lag = [t - min(turn) for t in turn]
        decision = Decision(tuple(choice), tuple(order), tuple(lag))
        if max(lag) <= problem.most_lag and schedule.is_legal(problem, decision):
            decisions.append(decision)
    return decisions


def _polished(
    t: Tables, problem: SearchProblem, decisions: list[Decision], seed: int, seconds: float
) -> mcmc.Walked | None:
    """The best of the decisions after a short walk; None where memory rounding let in one that does not fit."""
    best = min(decisions, key=lambda d: schedule.evaluate(t, d).objective_s)
    found = mcmc.search(problem, seed=seed, evaluations=POLISH_EVALUATIONS, seconds=seconds, start=best, tables=t)
    return found if isinstance(found, mcmc.Walked) else None


def _solver(seconds: float, seed: int, workers: int) -> cp_model.CpSolver:
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = max(seconds, 0.01)
    solver.parameters.num_workers = workers
    solver.parameters.random_seed = seed
    solver.parameters.interleave_search = True  # the same answer whatever the machine is doing
    return solver


def search(
    problem: SearchProblem,
    *,
    seconds: float,
    seed: int = 0,
    workers: int = 1,
    gap: float = GAP,
    hint: Decision | None = None,
    progress: Callable[[Proved], None] | None = None,
) -> Proved | Infeasible:
    """The best decision and a bound within about `seconds`, never worse than `hint`; done as soon as the gap is at most
    `gap`. Infeasible is proved, or nothing was found in time, as its reason says."""
    began = time.monotonic()
    first = hint or beginnings.fastest(problem)
    if first is None:
        return mcmc.apart(problem)
    t, relaxed, frame = schedule.tables(problem), relax(problem), cyclic.Frame.of(problem)
    best = _polished(t, problem, [first], seed, seconds)
    at = _Range(relaxed.bound_s, _longest(problem), best, gap, gap)
    if best is None:
        seconds = max(seconds, time.monotonic() - began + LEAST_S)
    unit_s = at.top_s / TICKS
    while not at.closed and (left := seconds - (time.monotonic() - began)) > 0.1:
        period = int(at.target_s / unit_s)
        status, decisions = _solved(
            frame.within(relaxed, at.target_s), period, unit_s, _solver(SHARE * left, seed, workers)
        )
        if status == cp_model.INFEASIBLE and at.best is None:
            return mcmc.overfull(problem, 0)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE, cp_model.INFEASIBLE):
            at = replace(at, hard_s=period * unit_s)
            continue
        found = _polished(t, problem, decisions, seed, left) if decisions else None
        at = at.after(period * unit_s, bool(decisions), found)
        if progress and at.best:
            progress(at.answer(time.monotonic() - began))
    return at.answer(time.monotonic() - began) if at.best else mcmc.overfull(problem, POLISH_EVALUATIONS)


def _solved(
    frame: cyclic.Frame | None, period: int, unit_s: float, solver: cp_model.CpSolver
) -> tuple[int, list[Decision]]:
    """Status of the model of a period, and the decisions of its solution; without a frame there is none."""
    if frame is None:
        return int(cp_model.INFEASIBLE), []
    m = cyclic.model(frame, period, unit_s)
    status = int(solver.solve(m.cp))
    return status, decode(solver, m) if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) else []


def _longest(problem: SearchProblem) -> float:
    """A period that every plan stays below: all calls and moves one after another, each at its slowest."""
    moves = sum(float(m.seconds.max()) for m in problem.moves.values())
    return moves + sum(float(options.time_s.max()) for options in problem.options)
