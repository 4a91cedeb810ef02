"""One suite that every solver passes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import fixed_tables
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_problems import (
    TESTS,
    best_objective_s,
    decisions,
    fits,
    is_legal,
    latency_s,
    period_s,
    problems,
    random_table,
)

from planner.search import exact, kernels, mcmc, portfolio, schedule
from planner.search.portfolio import Method, Solution
from planner.search.problem import Decision, Dependency, Options, SearchProblem
from planner.search.relaxation import Window, relax, windows
from planner.search.tidy import tidy
from plans.errors import Infeasible

METHODS = tuple(Method)
BOUNDED = (Method.EXACT, Method.AUTO)


def table_problem(seed: int = 1) -> SearchProblem:
    return fixed_tables.problem_of(random_table(np.random.default_rng(seed)))


def solve(problem: SearchProblem, method: Method, **limits: object) -> Solution | Infeasible:
    return portfolio.search(problem, method, **{"seconds": 20.0, "evaluations": 6000, **limits})  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problem=problems(calls=3, most_options=3))
def test_equals_brute_force(method: Method, problem: SearchProblem) -> None:
    best = best_objective_s(problem, kernels.LATENCY_WEIGHT)
    answer = solve(problem, method)
    if best is None:
        assert isinstance(answer, Infeasible) and answer.reason
        return
    assert isinstance(answer, Solution)
    assert is_legal(problem, answer.decision) and fits(problem, answer.decision.choice)
    period, latency = period_s(problem, answer.decision), latency_s(problem, answer.decision)
    assert (answer.period_s, answer.latency_s) == (pytest.approx(period), pytest.approx(latency))
    assert period + kernels.LATENCY_WEIGHT * latency == pytest.approx(best)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problem=st.one_of(problems(calls=3, most_options=3), problems(calls=4, most_options=2)))
def test_bound_is_never_above_the_optimum(problem: SearchProblem) -> None:
    best = best_objective_s(problem, 0.0)
    answer = exact.search(problem, seconds=10.0, gap=1e-3)
    if best is None:
        assert isinstance(answer, Infeasible)
    else:
        assert isinstance(answer, exact.Proved)
        assert answer.bound_s <= best + 1e-9


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problem=problems(calls=4, most_options=2))
def test_relaxation_is_never_above_any_plan(problem: SearchProblem) -> None:
    relaxed = relax(problem)
    for decision in decisions(problem):
        period = period_s(problem, decision) + 1e-9
        assert relaxed.bound_s <= period
        assert max(bounds[i] for bounds, i in zip(relaxed.option_s, decision.choice, strict=True)) <= period


def test_calls_between_two_others_share_the_gpus() -> None:
    """Three calls of area 4 between a source and a sink of one second each, every iteration after the one before."""

    def option(width: int, time_s: float) -> Options:
        nothing = np.zeros(1)
        return Options(first=nothing, width=np.array([width]), time_s=np.array([time_s]), resident_bytes=nothing,
                       transient_bytes=nothing, layout=nothing)  # fmt: skip

    between = [Dependency(0, c) for c in (1, 2, 3)] + [Dependency(c, 4) for c in (1, 2, 3)]
    problem = SearchProblem(
        gpus=4,
        capacity_bytes=1.0,
        names=tuple("abcde"),
        options=(option(4, 1.0), option(2, 2.0), option(2, 2.0), option(2, 2.0), option(1, 1.0)),
        edges=(*between, Dependency(4, 0, 1)),
    )
    assert windows(problem) == [Window(0, 4, (1, 2, 3))]
    assert relax(problem).bound_s == pytest.approx(1.0 + 3.0 + 1.0)


def test_calls_that_must_share_a_mesh_do() -> None:
    problem = table_problem()
    apart = solve(problem, Method.AUTO)
    together = [solve(replace(problem, same_mesh=((0, 1, 2),)), method) for method in METHODS]
    assert isinstance(apart, Solution)
    for answer in together:
        assert isinstance(answer, Solution)
        assert len({problem.mesh(call, answer.decision.choice[call]) for call in (0, 1, 2)}) == 1
        assert answer.period_s >= (apart.bound_s or 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_an_infeasible_shared_mesh_is_named(method: Method) -> None:
    problem = table_problem()
    first = [np.flatnonzero(o.first == 0) for o in problem.options]
    kept = (np.flatnonzero(problem.options[0].first != 0), *first[1:])
    answer = solve(replace(problem.restrict(kept), same_mesh=((0, 1),)), method)
    assert isinstance(answer, Infeasible) and problem.names[0] in answer.reason


@pytest.mark.parametrize("method", METHODS)
def test_a_search_without_time_still_finds_a_plan(method: Method) -> None:
    assert isinstance(solve(table_problem(), method, seconds=0.0), Solution)


@pytest.mark.parametrize("method", METHODS)
def test_never_worse_than_its_start(method: Method) -> None:
    problem = table_problem()
    best = solve(problem, method)
    assert isinstance(best, Solution)
    cost = schedule.evaluate(schedule.tables(problem), best.decision)
    again = solve(problem, method, start=best.decision, evaluations=16, seed=9)
    assert isinstance(again, Solution)
    assert again.period_s <= cost.period_s


def found_by_all() -> str:
    """The decisions of every method for two problems."""
    answers = {method: [solve(table_problem(seed), method, seed=4) for seed in (1, 2)] for method in METHODS}
    return repr([[a.decision for a in found if isinstance(a, Solution)] for found in answers.values()])


def test_same_seed_same_plan_in_another_process() -> None:
    script = "import test_solvers; print(test_solvers.found_by_all())"
    path = os.pathsep.join((TESTS, os.path.dirname(__file__), *sys.path))
    said = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "123")
    }
    here = found_by_all()
    assert said == {f"{here}\n"} and here.count("Decision(") == 2 * len(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_stops_in_its_budget(method: Method) -> None:
    solve(table_problem(), method)  # compiled
    began = time.monotonic()
    solve(table_problem(2), method, seconds=0.5, evaluations=1 << 40)
    assert time.monotonic() - began < 30  # and not after the evaluations, which take years


@pytest.mark.parametrize("method", METHODS)
def test_infeasible_says_why(method: Method) -> None:
    table = random_table(np.random.default_rng(1)) | {"gpu_mem": 19}
    answer = solve(fixed_tables.problem_of(table), method)
    assert isinstance(answer, Infeasible)
    assert "GiB" in answer.reason and answer.hint


@pytest.mark.parametrize("method", METHODS)
def test_calls_that_fit_only_apart_are_kept_apart(method: Method) -> None:
    """Two calls that are fastest on all GPUs, where their resident bytes do not fit together."""
    option = Options(
        first=np.array([0, 0, 2]),
        width=np.array([4, 2, 2]),
        time_s=np.array([1.0, 3.0, 3.0]),
        resident_bytes=np.array([3.0, 3.0, 3.0]),
        transient_bytes=np.zeros(3),
        layout=np.zeros(3),
    )
    problem = SearchProblem(
        gpus=4, capacity_bytes=5.0, names=("a", "b"), options=(option, option), edges=(Dependency(0, 1),)
    )
    answer = solve(problem, method)
    assert isinstance(answer, Solution)
    assert sorted(answer.decision.choice) == [1, 2] and answer.period_s == 3.0


@pytest.mark.parametrize("method", BOUNDED)
def test_gap_is_closed_on_a_small_cluster(method: Method) -> None:
    answer = solve(table_problem(), method)
    assert isinstance(answer, Solution) and answer.bound_s is not None
    assert answer.bound_s <= answer.period_s and answer.gap is not None and answer.gap <= 0.01


def test_a_resumed_walk_goes_on_where_it_stopped() -> None:
    problem = table_problem()
    block = mcmc.CHAINS * mcmc.STEPS_PER_ROUND
    whole = mcmc.search(problem, seed=2, evaluations=2 * block)
    first = mcmc.search(problem, seed=2, evaluations=block)
    assert isinstance(first, mcmc.Walked) and isinstance(whole, mcmc.Walked)
    rest = mcmc.search(problem, evaluations=block, resume=first.chains)
    assert isinstance(rest, mcmc.Walked)
    assert (rest.decision, rest.evaluated) == (whole.decision, whole.evaluated)
    assert (rest.chains.now == whole.chains.now).all()


def test_a_decision_in_graph_order_is_legal() -> None:
    assert schedule.is_legal(table_problem(), table_problem().plain((0,) * 5))


@pytest.mark.skipif(not hasattr(kernels.metropolis, "py_func"), reason="numba is not there or not enabled")
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problem=problems(calls=3, most_options=4), data=st.data())
def test_tidying_makes_nothing_worse(problem: SearchProblem, data: st.DataObject) -> None:
    legal = list(decisions(problem))
    if not legal:
        return
    decision = data.draw(st.sampled_from(legal))
    tidied = tidy(problem, decision)
    assert is_legal(problem, tidied) and fits(problem, tidied.choice)

    def objective_s(d: Decision) -> float:
        return period_s(problem, d) + kernels.LATENCY_WEIGHT * latency_s(problem, d)

    assert objective_s(tidied) <= objective_s(decision) + 1e-6
    for call, options in enumerate(problem.options):
        assert options.time_s[tidied.choice[call]] <= options.time_s[decision.choice[call]]
