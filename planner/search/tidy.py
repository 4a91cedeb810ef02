"""Make a decision readable without making it worse: no lag and no slow call (an offload, say) that brings nothing,
calls in graph order where possible."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.search import schedule
from planner.search.arrays import Tables
from planner.search.problem import Decision, IntArray, SearchProblem

TOLERANCE = 1e-9


def tidy(problem: SearchProblem, decision: Decision) -> Decision:
    """The decision with calls as fast on their meshes and as few lags as its objective allows, and in graph order if
    that costs nothing."""
    keep = tuple(_alike(problem, call, option) for call, option in enumerate(decision.choice))
    smaller = problem.restrict(keep)
    choice = tuple(int(np.searchsorted(kept, i)) for kept, i in zip(keep, decision.choice, strict=True))
    tables, decision = schedule.tables(smaller), replace(decision, choice=choice)
    decision = _in_order(smaller, tables, _quick(smaller, tables, decision))
    return replace(decision, choice=tuple(int(kept[i]) for kept, i in zip(keep, decision.choice, strict=True)))


def _alike(problem: SearchProblem, call: int, option: int) -> IntArray:
    """Options of a call on the same mesh with the same slices of the weights."""
    o = problem.options[call]
    columns = (o.first, o.width, o.layout)
    return np.flatnonzero(np.logical_and.reduce([column == column[option] for column in columns]))


def _quick(problem: SearchProblem, tables: Tables, decision: Decision) -> Decision:
    """Every call in turn with the fastest option that fits and makes nothing worse."""
    best = schedule.evaluate(tables, decision)
    for call, options in enumerate(problem.options):
        for option in np.argsort(options.time_s, kind="stable").tolist():
            if options.time_s[option] >= options.time_s[decision.choice[call]]:
                break
            choice = (*decision.choice[:call], option, *decision.choice[call + 1 :])
            cost = schedule.evaluate(tables, replace(decision, choice=choice))
            if cost.overflow_bytes <= best.overflow_bytes and cost.objective_s <= best.objective_s * (1 + TOLERANCE):
                decision = replace(decision, choice=choice)
                break
    return decision


def _in_order(problem: SearchProblem, tables: Tables, decision: Decision) -> Decision:
    """The decision with as few lags as possible, in graph order if possible."""

    def objective(candidate: Decision) -> float:
        return schedule.evaluate(tables, candidate).objective_s

    best = objective(decision) * (1 + TOLERANCE)
    plain = problem.plain(decision.choice)
    if objective(plain) <= best:
        return plain
    for call, lag in enumerate(decision.lag):
        for less in range(lag):
            lags = tuple(less if i == call else other for i, other in enumerate(decision.lag))
            candidate = replace(decision, lag=lags)
            if schedule.is_legal(problem, candidate) and objective(candidate) <= best:
                decision = candidate
                break
    in_order = replace(decision, order=tuple(range(problem.n_calls)))
    if schedule.is_legal(problem, in_order) and objective(in_order) <= best:
        return in_order
    return decision
