"""Make a decision readable without making it worse: no lag that brings nothing, calls in graph order where possible."""

from __future__ import annotations

from dataclasses import replace

from planner import schedule
from planner.problem import Decision, Problem

TOLERANCE = 1e-9


def tidy(problem: Problem, decision: Decision) -> Decision:
    """The decision with as few lags as its objective allows, and in graph order if that costs nothing."""
    tables = schedule.tables(problem)

    def objective(candidate: Decision) -> float:
        return schedule.evaluate(tables, candidate).objective_s

    best = objective(decision) * (1 + TOLERANCE)
    plain = Decision.plain(decision.choice)
    if objective(plain) <= best:
        return plain
    for call, lag in enumerate(decision.lag):
        if not lag:
            continue
        lags = tuple(0 if i == call else other for i, other in enumerate(decision.lag))
        candidate = replace(decision, lag=lags)
        if schedule.is_legal(problem, candidate) and objective(candidate) <= best:
            decision = candidate
    in_order = replace(decision, order=tuple(range(problem.n_calls)))
    if schedule.is_legal(problem, in_order) and objective(in_order) <= best:
        return in_order
    return decision
