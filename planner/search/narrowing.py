"""Which options a best plan can have, found before reallocations are priced: that is most of the work for large models.

With reallocations that take no time a problem is a relaxation of itself, so the bound of the plans that have an option
(`planner.search.relaxation`) holds there too. A plan from a short walk, priced with its own reallocations, is no better
than the best one: options whose bound is above its cost are in no better plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from planner.search import dominance, mcmc, schedule
from planner.search.dominance import Filtered
from planner.search.portfolio import NEAR
from planner.search.problem import Decision, IntArray, SearchProblem
from planner.search.relaxation import Relaxation, relax
from planner.search.schedule import Cost

EVALUATIONS = 48_000
NEAREST = 192
"""Options of every call among which a second walk knows the reallocations."""

WORTH = 2**17
"""Pairs of layouts whose reallocations take longer to price than a narrowing does."""

Part = tuple[IntArray, ...]
Price = Callable[[Part], SearchProblem]
"""From indices of the options of every call to the problem of these options, with their reallocation times."""


@dataclass(frozen=True, eq=False)
class Narrowed:
    """Options of every call that no plan better than `known` is without; `known` is in their numbers."""

    keep: Part
    known: Decision


def narrowed(
    problem: SearchProblem, price: Price, *, least_pairs: int = WORTH, evaluations: int = EVALUATIONS
) -> Narrowed | None:
    """What is left of a problem whose reallocations are free; None where no plan was found that fits, and where there
    are fewer than `least_pairs` of layouts between which reallocations are to be priced. evaluations: of each walk."""
    part = dominance.light(problem)
    if part is None or _pairs(problem) < least_pairs:
        return None
    relaxed = relax(part.problem)
    known = _walked(part, relaxed, evaluations)
    if known is None:
        return None
    known, cost = _improved(part, relaxed, known, price, evaluations)
    keep = tuple(before[kept] for before, kept in zip(part.keep, relaxed.within(cost.objective_s), strict=True))
    return Narrowed(keep, _within(keep, known))


def _pairs(problem: SearchProblem) -> int:
    """Pairs of different layouts of trainers and of their consumers."""
    different = [len(np.unique(np.stack([o.first, o.width, o.layout]), axis=1).T) for o in problem.options]
    return sum(different[u] * different[v] for u, v in problem.moves)


def _walked(part: Filtered, relaxed: Relaxation, evaluations: int) -> Decision | None:
    """A plan that is good where reallocations are free: among the options near the bound, else among all."""
    for among in (part.narrowed(relaxed.within(NEAR * relaxed.bound_s), ""), part):
        found = mcmc.search(among.problem, evaluations=evaluations)
        if isinstance(found, mcmc.Walked):
            return among.whole(found.decision)
    return None


def _improved(
    part: Filtered, relaxed: Relaxation, known: Decision, price: Price, evaluations: int
) -> tuple[Decision, Cost]:
    """The best plan of a walk that knows reallocations, among the plan's own options and those nearest to the bound."""
    nearest = [np.sort(np.argsort(bound_s, kind="stable")[:NEAREST]) for bound_s in relaxed.option_s]
    among = tuple(np.union1d(kept[at], [own]) for kept, at, own in zip(part.keep, nearest, known.choice, strict=True))
    problem = price(among)
    found = mcmc.search(problem, evaluations=evaluations, start=_within(among, known))
    assert isinstance(found, mcmc.Walked), "the walk begins at a plan that fits"
    choice = tuple(int(kept[i]) for kept, i in zip(among, found.decision.choice, strict=True))
    return replace(found.decision, choice=choice), schedule.cost(problem, found.decision)


def _within(part: Part, decision: Decision) -> Decision:
    """A decision in the numbers of a part that has its options."""
    choice = tuple(int(np.searchsorted(kept, own)) for kept, own in zip(part, decision.choice, strict=True))
    return replace(decision, choice=choice)
