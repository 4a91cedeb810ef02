"""What a search spends and how chains trade places: the ladder of temperatures, shares of time, what is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fixed_tables
import numpy as np
import pytest
from small_problems import random_table

from planner.search import dominance, exact, kernels, mcmc, portfolio
from planner.search.mcmc import Chains, Walked
from planner.search.portfolio import Method, Solution
from planner.search.problem import Decision, Dependency, Options, SearchProblem
from planner.search.tidy import tidy
from plans.errors import Infeasible


def table_problem() -> SearchProblem:
    return fixed_tables.problem_of(random_table(np.random.default_rng(1)))


def chains(costs: list[float]) -> Chains:
    """One call with one option; chain k is told by its lag."""
    count = len(costs)
    now = np.zeros((count, 3, 1), np.int64)
    now[:, 2, 0] = np.arange(count)
    table = np.full((count, 5), np.inf)
    table[:, kernels.PRESENT] = costs
    return Chains(now, now.copy(), np.ones((count, 4), np.int64), table, np.arange(1, 5))


def test_better_costs_sink_to_colder_chains_together_with_their_decisions() -> None:
    state = chains([3.0, 1.0, 2.0])
    mcmc._exchange(state, np.array([1e-3, 2e-3, 4e-3]))
    assert state.costs[:, kernels.PRESENT].tolist() == [1.0, 2.0, 3.0]
    assert state.now[:, 2, 0].tolist() == [1, 2, 0]


@pytest.mark.parametrize(("costs", "temperatures"), [((1.0, 2.0), (0.5, 1.0)), ((4.0, 4.5), (0.25, 2.0))])
def test_neighbours_trade_places_at_the_rate_of_parallel_tempering(
    costs: tuple[float, float], temperatures: tuple[float, float]
) -> None:
    """exp((cost - cost') (1 / T - 1 / T')), Geyer (1991)."""
    count, traded = 4000, 0
    exchange = np.array([123456789, 362436069, 521288629, 88675123])
    for _ in range(count):
        state = chains(list(costs))
        state.exchange[:] = exchange
        mcmc._exchange(state, np.array(temperatures))
        exchange = state.exchange.copy()
        traded += int(state.now[0, 2, 0])
    expected = np.exp((costs[0] - costs[1]) * (1 / temperatures[0] - 1 / temperatures[1]))
    assert traded / count == pytest.approx(expected, abs=0.03)


def test_temperatures_rise_evenly_from_chain_to_chain() -> None:
    seen: list[float] = []

    def loop(*arguments: Any) -> None:
        seen.append(arguments[6])
        kernels.metropolis(*arguments)

    found = mcmc.search(table_problem(), evaluations=6_000, loop=loop)
    assert isinstance(found, Walked) and found.evaluated == 6_000
    scale = sum(options.time_s.min() for options in table_problem().options)
    ladder = np.array(seen) / scale
    assert ladder[0] == pytest.approx(5e-4) and ladder[-1] == pytest.approx(3e-2)
    assert np.diff(np.log(ladder)) == pytest.approx(np.log(60) / (len(ladder) - 1))


def test_a_limit_in_seconds_that_is_far_off_ends_nothing() -> None:
    found = mcmc.search(table_problem(), seconds=3600.0, evaluations=20_000)
    assert isinstance(found, Walked) and found.evaluated == 20_000 and found.seconds < 3600.0


def record(monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[int, float]], list[Decision | None]]:
    """Evaluations and seconds of every walk of a search, and where it begins."""
    spent: list[tuple[int, float]] = []
    begun: list[Decision | None] = []
    walk: Callable[..., Walked | Infeasible] = mcmc.search

    def recorded(problem: SearchProblem, **limits: Any) -> Walked | Infeasible:
        spent.append((limits["evaluations"], limits["seconds"]))
        begun.append(limits["start"])
        return walk(problem, **limits)

    monkeypatch.setattr(portfolio.mcmc, "search", recorded)
    return spent, begun


@pytest.mark.parametrize(("method", "share"), [(Method.AUTO, 0.4), (Method.MCMC, 1.0)])
def test_walks_have_their_shares(monkeypatch: pytest.MonkeyPatch, method: Method, share: float) -> None:
    """Two thirds near the bound, the rest among what is left; four tenths of the time where a proof follows."""
    monkeypatch.setattr(exact, "search", lambda *_, **__: Infeasible("no time", ""))
    spent, begun = record(monkeypatch)
    answer = portfolio.search(table_problem(), method, seconds=60.0, evaluations=9_000)
    assert isinstance(answer, Solution), "a proof that fails takes nothing away"
    assert (spent[0][0], spent[-1][0]) == (6_000, 3_000)
    assert spent[0][1] == pytest.approx(60.0 * share * 2 / 3)
    assert 60.0 * share - 30.0 < spent[-1][1] < 60.0 * share
    assert begun[0] is None and begun[-1] is not None, "the last walk begins at the best so far"
    assert answer.evaluated == sum(evaluations for evaluations, _ in spent)


def test_walks_begin_at_the_start_and_then_at_the_best() -> None:
    problem = table_problem()
    part = dominance.light(problem)
    assert part is not None
    start, best = problem.plain((1,) * 5), problem.plain((2,) * 5)
    begins = [
        portfolio._Search(problem, 0, 1, None, first, best=found)._begin(part)
        for first in (None, start)
        for found in (None, best)
    ]
    assert begins == [None, best, start, best]


def lone(gpu: int, seconds: float) -> Options:
    nothing = np.zeros(1)
    return Options(
        first=np.array([gpu]), width=np.array([1]), time_s=np.array([seconds]), resident_bytes=nothing,
        transient_bytes=nothing, layout=nothing,
    )  # fmt: skip


def test_a_lag_that_gains_stays_and_one_that_does_not_goes() -> None:
    """x, y, z of 2 s in a row, x and z on one GPU: 6 s, or 4 s where z of the iteration before fills the wait for y.
    The lag of w, alone on a GPU, gains nothing; nor does an order in which z stands before y."""
    problem = SearchProblem(
        gpus=4, capacity_bytes=1.0, names=("w", "x", "y", "z"), options=tuple(lone(gpu, 2.0) for gpu in (3, 0, 1, 0)),
        edges=(Dependency(1, 2), Dependency(2, 3)),
    )  # fmt: skip
    choice = (0,) * 4
    assert tidy(problem, Decision(choice, (0, 1, 3, 2), (1, 0, 0, 1))) == Decision(choice, (0, 1, 2, 3), (0, 0, 0, 1))
    assert tidy(problem, Decision(choice, (1, 2, 0, 3), (1, 1, 1, 1))) == problem.plain(choice)
