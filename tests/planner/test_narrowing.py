"""Options that are left out before reallocations are priced: no plan as good as the known one has one of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_problems import best_objective_s, decisions, fits, is_legal, latency_s, period_s, problems

from cost_models.engines.engine import MEGATRON
from planner.best import Effort, Found, best_in
from planner.request import build_request
from planner.search import kernels
from planner.search.narrowing import narrowed
from planner.search.portfolio import Method
from planner.search.problem import Decision, Dependency, Moves, Options, SearchProblem
from planner.space import pricing
from planner.space.limits import Limits
from planner.space.pricing import Space, build_space


def objective_s(problem: SearchProblem, decision: Decision) -> float:
    """By the book."""
    return period_s(problem, decision) + kernels.LATENCY_WEIGHT * latency_s(problem, decision)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    problem=st.one_of(problems(calls=3, most_options=3), problems(calls=4, most_options=2)),
    evaluations=st.sampled_from((1, 2000)),
)
def test_every_plan_that_is_as_good_stays(problem: SearchProblem, evaluations: int) -> None:
    moves = {pair: Moves.free(*moves.shape) for pair, moves in problem.moves.items()}
    left = narrowed(replace(problem, moves=moves), problem.restrict, least_pairs=0, evaluations=evaluations)
    best = best_objective_s(problem, kernels.LATENCY_WEIGHT)
    if left is None:
        assert best is None
        return
    smaller = problem.restrict(left.keep)
    assert is_legal(smaller, left.known) and fits(smaller, left.known.choice)
    known = objective_s(smaller, left.known)
    for decision in decisions(problem):
        kept = all(option in some for option, some in zip(decision.choice, left.keep, strict=True))
        assert kept or objective_s(problem, decision) >= known - 1e-9
    assert best_objective_s(smaller, kernels.LATENCY_WEIGHT) == pytest.approx(best)


def test_reallocations_alone_make_a_plan_slow() -> None:
    """A consumer that is faster in another layout, by less than the reallocation to it takes."""

    def options(layout: list[int], time_s: list[float]) -> Options:
        nothing = np.zeros(len(layout))
        return Options(first=0 * np.array(layout), width=1 + 0 * np.array(layout), time_s=np.array(time_s),
                       resident_bytes=nothing, transient_bytes=nothing, layout=np.array(layout))  # fmt: skip

    seconds = np.array([[2.0, 0.0, 9.0]])
    problem = SearchProblem(
        gpus=1, capacity_bytes=1.0, names=("reads", "trains"),
        options=(options([1, 0, 2], [9.0, 10.0, 20.5]), options([0], [10.0])),
        edges=(Dependency(0, 1), Dependency(1, 0, 1)), moves={(1, 0): Moves.of_options(seconds)},
    )  # fmt: skip
    free = replace(problem, moves={(1, 0): Moves.free(1, 3)})
    left = narrowed(free, problem.restrict, least_pairs=0)
    assert left is not None and problem.restrict(left.keep).options[0].time_s[left.known.choice[0]] == 10.0
    assert left.keep[0].tolist() == [0, 1]  # 30.5 s are too many; 19 s would be enough if nothing had to move
    assert narrowed(free, problem.restrict) is None, "few reallocations are priced at once"


def test_a_narrowed_space_has_the_same_best_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    request = build_request(models={"actor": "llama-7b"}, gpus=8)
    asked = (request.workload, request.cluster, MEGATRON, Limits())
    whole = build_space(*asked)
    monkeypatch.setattr(pricing, "narrowed", partial(narrowed, least_pairs=0))
    space = build_space(*asked, whole=False)
    assert isinstance(whole, Space) and isinstance(space, Space) and space.known
    at = {name: [whole.options[name].index(entry) for entry in entries] for name, entries in space.options.items()}
    part = whole.problem.restrict(tuple(np.array(kept) for kept in at.values()))
    for pair, moves in space.problem.moves.items():
        every = [np.arange(n) for n in moves.shape]
        assert np.array_equal(moves.between(*every), part.moves[pair].between(*every))
    for own, other in zip(space.problem.options, part.options, strict=True):
        assert len(own) == len(other) and np.array_equal(own.time_s, other.time_s)
    assert sum(map(len, part.options)) < sum(map(len, whole.problem.options))
    assert space.pruned["every plan with it takes longer than a known one"]
    effort = Effort(seconds=60.0, method=Method.MCMC, evaluations=200_000)
    found, best = best_in(space, effort), best_in(whole, effort)
    assert isinstance(found, Found) and isinstance(best, Found) and found.bound_s and best.bound_s
    assert found.bound_s <= best.cost.iteration_s * (1 + 1e-9) and best.bound_s <= found.cost.iteration_s * (1 + 1e-9)
    assert found.cost.iteration_s <= 1.008 * best.cost.iteration_s
    for name, (mesh, strategy) in ((p.call, (p.mesh, p.strategy)) for p in best.plan.calls):
        assert best.cost.iteration_s > found.cost.iteration_s or (mesh, strategy) in space.options[name]
