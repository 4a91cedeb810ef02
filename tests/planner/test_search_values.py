"""Small schedules by hand: alternating periods, latencies, copies that are shared, and when a proof is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planner.search import exact, kernels, schedule
from planner.search.mcmc import Walked
from planner.search.problem import Decision, Dependency, Moves, Options, SearchProblem
from planner.search.relaxation import relax


def option(gpu: int, seconds: float, resident: float = 0.0, transient: float = 0.0, **more: Any) -> Options:
    """One option on one GPU."""
    layout, shared = more.get("layout", 0), more.get("shared", 0.0)
    return Options(
        first=np.array([gpu]), width=np.array([1]), time_s=np.array([seconds]), resident_bytes=np.array([resident]),
        transient_bytes=np.array([transient]), layout=np.array([layout]), copy_bytes=np.array([shared]),
    )  # fmt: skip


def problem(options: list[Options], edges: list[Dependency], **more: Any) -> SearchProblem:
    names = tuple("abcdef"[: len(options)])
    return SearchProblem(
        gpus=4,
        capacity_bytes=more.pop("capacity", 100.0),
        names=names,
        options=tuple(options),
        edges=tuple(edges),
        **more,
    )


def test_a_ring_over_two_iterations_goes_by_turns_of_three_and_six() -> None:
    """a -> b -> c of 3 s each on GPUs of their own, and a waits for c of two iterations before: its starts are 0, 3, 9,
    12, 18, ..., 4.5 s apart in the mean; 9 s are twice 4.5."""
    ring = [Dependency(0, 1), Dependency(1, 2), Dependency(2, 0, 2)]
    found = problem([option(gpu, 3.0) for gpu in range(3)], ring)
    cost = schedule.cost(found, found.plain((0, 0, 0)))
    assert (cost.period_s, cost.latency_s) == (pytest.approx(4.5), pytest.approx(9.0))
    assert relax(found).bound_s == pytest.approx(4.5)


@pytest.mark.parametrize("seconds", [(3.5, 5.25), (5.25, 3.5), (4.0, 5.0), (5.0, 4.0), (2.0, 6.0, 3.0)])
def test_calls_that_wait_for_nothing_go_at_the_pace_of_the_slowest(seconds: tuple[float, ...]) -> None:
    found = problem([option(gpu, s) for gpu, s in enumerate(seconds)], [])
    cost = schedule.cost(found, found.plain((0,) * len(seconds)))
    assert (cost.period_s, cost.latency_s) == (pytest.approx(max(seconds)), pytest.approx(max(seconds)))


def test_working_arrays_have_room_for_the_deepest_look_back() -> None:
    """Two iterations back by an edge, one by a turn, and a lag of two that the turn allows."""
    edges, turns = [Dependency(0, 1), Dependency(1, 0, 2)], (Dependency(0, 1, -1),)
    found = problem([option(0, 1.0), option(1, 1.0)], edges, turns=turns)
    room = schedule.scratch(schedule.tables(found))
    assert found.most_lag == 2 and len(room.ends) >= kernels.PERIODS + found.most_lag + 2
    assert room.wait.shape[:2] == (4, 4 + len(edges)) and len(room.duration) >= 4


def test_weights_of_the_iteration_before_delay_no_lone_iteration() -> None:
    """b reads what a has trained one iteration before: alone, both begin at once."""
    found = problem([option(0, 5.0), option(1, 2.0)], [Dependency(0, 1, 1)])
    assert schedule.cost(found, Decision((0, 0), (0, 1), (0, 0))).latency_s == 5.0


@pytest.mark.parametrize(("layout", "overflow"), [(0, 0.0), (1, 1.0)])
def test_a_copy_is_shared_on_one_mesh_in_one_layout_alone(layout: int, overflow: float) -> None:
    """The trainer holds 4 and works with 3; the reader works with 5, of which 2 are weights: 7 in all, or 9 of 8."""
    reader, trainer = option(0, 1.0, 0.0, 5.0, shared=2.0, layout=layout), option(0, 1.0, 4.0, 3.0)
    moves = {(1, 0): Moves.of_options(np.array([[float(layout)]]))}
    found = problem([reader, trainer], [Dependency(0, 1), Dependency(1, 0, 1)], moves=moves, capacity=8.0)
    assert schedule.cost(found, found.plain((0, 0))).overflow_bytes == pytest.approx(2 * overflow), "at both calls"


def test_a_second_reader_finds_the_copy_of_the_first() -> None:
    """Both read on GPU 0, for 3 s and 1 s, what is trained on GPU 1 in 4 s and sent in 2 s: 10 s a round, 12 s if each
    had a copy of its own."""
    moves = {(2, v): Moves.of_options(np.array([[2.0]])) for v in (0, 1)}
    edges = [Dependency(0, 1), Dependency(1, 2), Dependency(2, 0, 1), Dependency(2, 1, 1)]
    found = problem([option(0, 3.0), option(0, 1.0), option(1, 4.0)], edges, moves=moves)
    assert schedule.cost(found, found.plain((0, 0, 0))).period_s == pytest.approx(10.0)


def test_the_first_call_may_be_the_trainer() -> None:
    """It trains for 4 s and sends in 2 s what the other reads one iteration later."""
    moves = {(0, 1): Moves.of_options(np.array([[2.0]]))}
    found = problem([option(1, 4.0), option(0, 3.0)], [Dependency(0, 1, 1)], moves=moves)
    assert schedule.cost(found, found.plain((0, 0))).period_s == pytest.approx(6.0)


def walked(period_s: float) -> Walked:
    return Walked(Decision((0,), (0,), (0,)), period_s, period_s, period_s, 1, 0.0, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bound_s", "status"), [(9.0, exact.Outcome.STOPPED), (9.89, exact.Outcome.STOPPED), (9.91, exact.Outcome.PROVED)]
)
def test_a_plan_is_proved_where_bound_and_period_are_within_the_gap(bound_s: float, status: exact.Outcome) -> None:
    """A gap of 1 %, and two ticks of 10 s / 16,384."""
    at = exact._Range(bound_s, 12.0, walked(10.0), 0.01, 0.01)
    answer = at.answer(1.0)
    assert (answer.status, answer.bound_s, at.closed) == (status, bound_s, status is exact.Outcome.PROVED)
    ticks = exact._Range(9.9 - 1.5 * 10 / exact.TICKS, 12.0, walked(10.0), 0.01, 0.01)
    assert ticks.answer(1.0).status is exact.Outcome.PROVED, "periods are rounded to ticks twice"


def test_a_range_narrows_from_both_sides() -> None:
    at = exact._Range(5.0, 20.0, walked(10.0), 0.01, 0.01)
    raised = at.after(8.0, False, None)
    assert (raised.bound_s, raised.top_s, raised.best) == (8.0, 10.0, at.best)
    lowered = at.after(9.0, True, walked(8.5))
    assert (lowered.bound_s, lowered.top_s, lowered.step) == (5.0, 8.5, 0.02)
    assert at.after(9.0, True, walked(11.0)).best is at.best
