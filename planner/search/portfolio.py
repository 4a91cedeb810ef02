"""One call for all methods: bound, walk among the options that the bound leaves, then prove.

The bound comes first (`planner.search.relaxation`): the walk is spent on options near it. Once a plan is known, options
whose own bound is above that plan's cost are in no better plan and are dropped for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from planner.search import dominance, exact, mcmc, schedule
from planner.search.dominance import Filtered
from planner.search.problem import Decision, SearchProblem
from planner.search.relaxation import Relaxation, relax
from planner.search.schedule import Cost
from plans.errors import Infeasible

ALONE_EVALUATIONS = 3_000_000
START_EVALUATIONS = 600_000  # of walks whose result is only the exact search's start
WALK_SHARE = 0.4  # of the time, where an exact search follows
FIRST_SHARE = 2 / 3  # of a walk's time and evaluations, among the options near the bound
NEAR = 1.12  # times the bound
USELESS = "every plan with it takes longer than the one found"


class Method(StrEnum):
    """How to search: Metropolis-Hastings with a bound, CP-SAT alone, or the one as the other's start; a walk is
    Metropolis-Hastings and no more, without a bound."""

    AUTO = "auto"
    EXACT = "exact"
    MCMC = "mcmc"
    WALK = "walk"


@dataclass(frozen=True)
class Solution:
    """The best decision, in the numbers of the problem that was asked; `bound_s` is None where nothing was proved.

    dropped: reason -> options that were not searched because no optimum needs them.
    """

    decision: Decision
    period_s: float
    latency_s: float
    bound_s: float | None
    evaluated: int
    seconds: float
    dropped: dict[str, int]

    @property
    def gap(self) -> float | None:
        """How much shorter the best period could be, as a part of this one."""
        return None if self.bound_s is None else max(0.0, 1.0 - self.bound_s / self.period_s)


@dataclass(frozen=True, slots=True)
class Progress:
    """What is known while a search goes on."""

    seconds: float
    period_s: float
    bound_s: float | None
    evaluated: int


@dataclass(eq=False)
class _Search:
    """One search at work: what is asked, and what is known so far, in the numbers of the problem."""

    problem: SearchProblem
    seed: int
    workers: int
    progress: Callable[[Progress], None] | None
    start: Decision | None
    best: Decision | None = None
    cost: Cost | None = None
    bound_s: float | None = None
    evaluated: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def spent_s(self) -> float:
        """Seconds since the search began."""
        return time.monotonic() - self.began

    @property
    def objective_s(self) -> float:
        """Of the best decision, infinite where there is none."""
        return self.cost.objective_s if self.cost else np.inf

    def tell(self, period_s: float, evaluated: int = 0) -> None:
        """Report a plan."""
        if self.progress:
            self.progress(Progress(self.spent_s, period_s, self.bound_s, self.evaluated + evaluated))

    def offer(self, decision: Decision) -> None:
        """Keep a decision that fits if it is the best so far."""
        cost = schedule.cost(self.problem, decision)
        if cost.overflow_bytes == 0 and cost.objective_s < self.objective_s:
            self.best, self.cost = decision, cost

    def walk(self, part: Filtered, evaluations: int, seconds: float) -> Infeasible | None:
        """Metropolis-Hastings among a part of the options, from the best decision where it lies there."""
        found = mcmc.search(
            part.problem,
            seed=self.seed,
            seconds=seconds,
            evaluations=evaluations,
            start=self._begin(part),
            workers=self.workers,
            progress=lambda found: self.tell(found.period_s, found.evaluated),
        )
        if isinstance(found, Infeasible):
            return found
        self.evaluated += found.evaluated
        self.offer(part.whole(found.decision))
        return None

    def explore(self, part: Filtered, relaxed: Relaxation, evaluations: int, seconds: float) -> Infeasible | None:
        """Walk among the options near the bound; among all of a part where that ends far from the bound."""
        near = part.narrowed(relaxed.within(NEAR * relaxed.bound_s), USELESS)
        failed = self.walk(near, int(evaluations * FIRST_SHARE), seconds * FIRST_SHARE)
        return self.walk(part, evaluations, seconds) if self.objective_s > NEAR * relaxed.bound_s else failed

    def prove(self, part: Filtered, seconds: float, gap: float) -> Infeasible | None:
        """Exact search among a part of the options that has all better plans."""
        proved = exact.search(
            part.problem,
            seconds=seconds,
            seed=self.seed,
            workers=self.workers,
            gap=gap,
            hint=self._begin(part),
            progress=self._heard,
        )
        if isinstance(proved, Infeasible):
            return proved
        self.offer(part.whole(proved.decision))
        self.bound_s = max(self.bound_s or 0.0, proved.bound_s)
        return None

    def _begin(self, part: Filtered) -> Decision | None:
        """The best decision, or the one to start from, where it lies in a part."""
        first = self.best or self.start
        return part.begin(first) if first else None

    def _heard(self, found: exact.Proved) -> None:
        self.bound_s = max(self.bound_s or 0.0, found.bound_s)
        self.tell(found.period_s)

    def answer(self, dropped: dict[str, int]) -> Solution:
        """What was found."""
        assert self.best and self.cost
        bound_s = None if self.bound_s is None else min(self.bound_s, self.cost.period_s)
        return Solution(
            self.best, self.cost.period_s, self.cost.latency_s, bound_s, self.evaluated, self.spent_s, dropped
        )


def search(
    problem: SearchProblem, method: Method | str = Method.AUTO, *, seconds: float, seed: int = 0, workers: int = 1,
    evaluations: int | None = None, gap: float = exact.GAP, start: Decision | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Solution | Infeasible:  # fmt: skip
    """The best decision within about `seconds`, never worse than `start`; done as soon as a gap of `gap` is proved.

    The walk has `evaluations` at most (a number that is reached gives the same plan in every process).
    """
    method = Method(method)
    evaluations = evaluations or (ALONE_EVALUATIONS if method in (Method.MCMC, Method.WALK) else START_EVALUATIONS)
    schedule.compile_kernels()
    at = _Search(problem, seed, workers, progress, start)
    part = dominance.light(problem)
    if part is None:
        return mcmc.overfull(problem, 0)
    if start:
        at.offer(start)
    if method is Method.WALK:
        failed = at.walk(part, evaluations, seconds)
        return at.answer(part.counts) if at.best else failed or mcmc.overfull(problem, at.evaluated)
    relaxed = relax(part.problem)
    at.bound_s = relaxed.bound_s
    if method is not Method.EXACT:
        walk_s = seconds if method is Method.MCMC else seconds * WALK_SHARE
        failed = at.explore(part, relaxed, evaluations, walk_s)
        if method is Method.MCMC and not at.best:
            return failed or mcmc.overfull(problem, at.evaluated)
    if at.best:
        part = part.narrowed(relaxed.within(at.objective_s), USELESS)
    if method is not Method.EXACT and at.best:
        at.walk(part, max(1, int(evaluations * (1 - FIRST_SHARE))), max(0.0, walk_s - at.spent_s))
    if method is not Method.MCMC:
        failed = at.prove(part, max(0.0, seconds - at.spent_s), gap)
        if failed and not at.best:
            return failed
    return at.answer(part.counts)
