"""Short searches beside a plan: a seeded walk through a space, from the plan where the space has its layouts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cost_models.estimate import PlanCost, cost_plan
from planner.pricing import Space
from planner.search import mcmc, schedule
from planner.search.problem import Decision, IntArray
from planner.tidy import tidy
from plans.plan import ExecutionPlan

EVALUATIONS_PER_SECOND = 200_000


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a search may take. The evaluations are what decides where the machine is fast enough, so that the same
    seed gives the same answer."""

    seconds: float
    seed: int
    workers: int

    @property
    def evaluations(self) -> int:
        """Plans that a search looks at, at most."""
        return max(1, int(self.seconds * EVALUATIONS_PER_SECOND))

    def part(self, share: float) -> Effort:
        """A share of it."""
        return Effort(self.seconds * share, self.seed, self.workers)


def everything(space: Space) -> tuple[IntArray, ...]:
    """Indices of all options of every call."""
    return tuple(np.arange(len(options)) for options in space.problem.options)


def walk(space: Space, keep: tuple[IntArray, ...], start: Decision | None, effort: Effort) -> Decision | None:
    """The best decision seen among the options `keep`, in the numbers of the space; None where none was seen to fit.

    Where `start` has an option that is not kept, the fastest that is kept takes its place.
    """
    problem = space.problem.restrict(keep)
    first = start and Decision(_nearest(space, keep, start), start.order, start.lag)
    if first and not schedule.is_legal(problem, first):
        first = None
    found = mcmc.search(
        problem,
        seed=effort.seed,
        seconds=effort.seconds,
        evaluations=effort.evaluations,
        start=first,
        workers=effort.workers,
    )
    if not isinstance(found, mcmc.Found):
        return None
    decision = tidy(problem, found.decision)
    choice = tuple(int(kept[i]) for kept, i in zip(keep, decision.choice, strict=True))
    return Decision(choice, decision.order, decision.lag)


def _nearest(space: Space, keep: tuple[IntArray, ...], start: Decision) -> tuple[int, ...]:
    """Positions in `keep` of the start's options, or of the fastest."""
    choice = []
    for options, kept, wanted in zip(space.problem.options, keep, start.choice, strict=True):
        at = np.flatnonzero(kept == wanted)
        choice.append(int(at[0]) if len(at) else int(options.time_s[kept].argmin()))
    return tuple(choice)


def as_decision(plan: ExecutionPlan, space: Space) -> Decision | None:
    """The plan in the numbers of a space; a layout that the space has not is replaced by the fastest on its mesh, and
    there is no decision where the space has nothing on that mesh."""
    names = space.problem.names
    choice = []
    for name, options in zip(names, space.problem.options, strict=True):
        planned = plan.planned(name)
        entries = space.options[name]
        same = [i for i, entry in enumerate(entries) if entry == (planned.mesh, planned.strategy)]
        near = same or [i for i, (mesh, _) in enumerate(entries) if mesh == planned.mesh]
        if not near:
            return None
        choice.append(min(near, key=lambda i: float(options.time_s[i])))
    order = tuple(names.index(planned.call) for planned in plan.calls)
    return Decision(tuple(choice), order, tuple(plan.planned(name).lag for name in names))


def costed(space: Space, decision: Decision | None) -> PlanCost | None:
    """The full cost of a decision, None where it does not fit after all."""
    cost = cost_plan(space.plan(decision), space.engine) if decision else None
    return cost if cost and cost.fits else None
