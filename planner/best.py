"""Search for the best plan: the one way for the commands, for explanations and remedies, and for Python programs.

request = build_request(models={"actor": "llama-7b"}, gpus=16)
found = best_plan(request.workload, request.cluster)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cost_models.engines.engine import MEGATRON, Engine
from cost_models.estimate import PlanCost, cost_plan
from planner.search import portfolio, schedule
from planner.search.narrowing import Part
from planner.search.portfolio import Method, Progress
from planner.search.problem import Decision, SearchProblem
from planner.search.tidy import tidy
from planner.space.limits import Limits
from planner.space.pricing import Space, build_space
from plans.cluster import ClusterSpec
from plans.codec import save_plan
from plans.errors import Infeasible
from plans.plan import ExecutionPlan
from plans.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How a search goes about it, and how long it may take.

    seconds: for the search itself; pricing the space comes before. evaluations: plans that a walk looks at, at most
    (None: as many as suit the method); where they decide and not the seconds, the same seed gives the same plan on
    every machine. workers: threads.
    """

    seconds: float = 10.0
    seed: int = 0
    workers: int = 1
    method: Method = Method.AUTO
    evaluations: int | None = None

    def part(self, share: float) -> Effort:
        """A share of it."""
        evaluations = None if self.evaluations is None else max(1, int(self.evaluations * share))
        return replace(self, seconds=self.seconds * share, evaluations=evaluations)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best plan that a search saw, with its full cost.

    decision: the plan in the numbers of `space`. bound_s: no plan of the space takes less (None: nothing was proved).
    evaluated: plans that were looked at. dropped: reason -> options that no optimum needs.
    """

    space: Space
    decision: Decision
    cost: PlanCost
    bound_s: float | None
    evaluated: int
    seconds: float
    dropped: Mapping[str, int]

    @property
    def plan(self) -> ExecutionPlan:
        """The plan, with its estimate."""
        return self.cost.program.plan.with_estimate(self.cost.estimate)

    @property
    def gap(self) -> float | None:
        """How much shorter the best period could be, as a part of this one."""
        return None if self.bound_s is None else max(0.0, 1.0 - self.bound_s / self.cost.iteration_s)

    def save(self, path: str | Path) -> Path:
        """Write the plan file; gives its path."""
        save_plan(self.plan, Path(path))
        return Path(path)


def best_plan(
    workload: Workload,
    cluster: ClusterSpec,
    engine: Engine = MEGATRON,
    limits: Limits | None = None,
    effort: Effort | None = None,
    progress: Callable[[Progress], None] | None = None,
    *,
    start: ExecutionPlan | None = None,
) -> Found | Infeasible:
    """The best plan that is found within the limits, never slower than `start` where that is in the space."""
    space = build_space(workload, cluster, engine, limits or Limits(), whole=False)
    if isinstance(space, Infeasible):
        return space
    return best_in(space, effort, progress, start=space.decision_of(start) if start else None)


def best_in(
    space: Space,
    effort: Effort | None = None,
    progress: Callable[[Progress], None] | None = None,
    *,
    start: Decision | None = None,
    among: Part | None = None,
) -> Found | Infeasible:
    """The best plan of a priced space, `among` some options of every call (None: all), never slower than `start` or
    the plan that the space knows. Where one has an option that is not among them, the fastest that is takes its place.
    """
    effort, began = effort or Effort(), time.perf_counter()
    part = everything(space) if among is None else among
    problem = space.problem if among is None else space.problem.restrict(part)
    found = portfolio.search(
        problem,
        effort.method,
        seconds=effort.seconds,
        seed=effort.seed,
        workers=effort.workers,
        evaluations=effort.evaluations,
        start=_first(problem, [replace(d, choice=_nearest(space, part, d)) for d in (start, space.known) if d]),
        progress=progress,
    )
    if isinstance(found, Infeasible):
        return found
    tidied = tidy(problem, found.decision)
    choice = tuple(int(kept[i]) for kept, i in zip(part, tidied.choice, strict=True))
    decision = replace(tidied, choice=choice)
    return Found(
        space=space,
        decision=decision,
        cost=cost_plan(space.plan(decision), space.engine),
        bound_s=found.bound_s,
        evaluated=found.evaluated,
        seconds=time.perf_counter() - began,
        dropped=found.dropped,
    )


def _first(problem: SearchProblem, starts: Sequence[Decision]) -> Decision | None:
    """The best of some decisions, if one is legal."""

    def badness(start: Decision) -> tuple[float, float]:
        cost = schedule.cost(problem, start)
        return cost.overflow_bytes, cost.objective_s

    return min((start for start in starts if schedule.is_legal(problem, start)), key=badness, default=None)


def everything(space: Space) -> Part:
    """Indices of all options of every call."""
    return tuple(np.arange(len(options)) for options in space.problem.options)


def _nearest(space: Space, part: Part, start: Decision) -> tuple[int, ...]:
    """Positions in the part of the start's options, or of the fastest."""
    choice = []
    for options, kept, wanted in zip(space.problem.options, part, start.choice, strict=True):
        at = np.flatnonzero(kept == wanted)
        choice.append(int(at[0]) if len(at) else int(options.time_s[kept].argmin()))
    return tuple(choice)
