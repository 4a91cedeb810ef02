"""One call for all methods: drop dominated options, walk, then prove."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from planner import dominance, exact, mcmc, schedule
from planner.problem import Decision, Problem
from plans.errors import Infeasible

ALONE_EVALUATIONS = 3_000_000
START_EVALUATIONS = 300_000  # of a walk whose result is only the exact search's start
MCMC_SHARE = 0.4  # of the time, where an exact search follows


class Method(StrEnum):
    """How to search: Metropolis-Hastings alone, CP-SAT alone, or the one as the other's start."""

    AUTO = "auto"
    EXACT = "exact"
    MCMC = "mcmc"


@dataclass(frozen=True)
class Answer:
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


def search(
    problem: Problem,
    method: Method | str = Method.AUTO,
    *,
    seconds: float,
    seed: int = 0,
    workers: int = 1,
    evaluations: int | None = None,
    start: Decision | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Answer | Infeasible:
    """The best decision within about `seconds`, never worse than `start`.

    The walk has `evaluations` at most (a number that is reached gives the same plan in every process).
    """
    began, method = time.monotonic(), Method(method)
    evaluations = evaluations or (ALONE_EVALUATIONS if method is Method.MCMC else START_EVALUATIONS)
    smaller = dominance.filtered(problem)
    if smaller is None:
        return mcmc.overfull(problem, 0)
    first = smaller.begin(start) if start else None
    walked: mcmc.Found | Infeasible | None = None

    def tell(period_s: float, bound_s: float | None, evaluated: int) -> None:
        if progress:
            progress(Progress(time.monotonic() - began, period_s, bound_s, evaluated))

    if method is not Method.EXACT:
        walked = mcmc.search(
            smaller.problem,
            seed=seed,
            seconds=seconds * (1.0 if method is Method.MCMC else MCMC_SHARE),
            evaluations=evaluations,
            start=first,
            workers=workers,
            progress=lambda found: tell(found.period_s, None, found.evaluated),
        )
    evaluated = walked.evaluated if isinstance(walked, mcmc.Found) else 0
    if method is Method.MCMC:
        if not isinstance(walked, mcmc.Found):
            return walked or mcmc.overfull(problem, 0)
        return _answer(smaller, problem, walked.decision, None, evaluated, began)
    proved = exact.search(
        smaller.problem,
        seconds=max(0.0, seconds - (time.monotonic() - began)),
        seed=seed,
        workers=workers,
        hint=walked.decision if isinstance(walked, mcmc.Found) else first,
        progress=lambda found: tell(found.period_s, found.bound_s, evaluated),
    )
    if isinstance(proved, Infeasible):
        return proved
    return _answer(smaller, problem, proved.decision, proved.bound_s, evaluated, began)


def _answer(
    smaller: dominance.Filtered,
    problem: Problem,
    decision: Decision,
    bound_s: float | None,
    evaluated: int,
    began: float,
) -> Answer:
    original = Decision(smaller.original(decision.choice), decision.order, decision.lag)
    cost = schedule.evaluate(schedule.tables(problem), original)
    seconds = time.monotonic() - began
    return Answer(original, cost.period_s, cost.latency_s, bound_s, evaluated, seconds, smaller.counts)
