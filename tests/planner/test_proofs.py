"""Bounds and cyclic models of small problems by hand, and against trying every decision of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from ortools.sat.python import cp_model
from small_problems import decisions, fits, problems

from planner.search import cyclic, dominance, exact, relaxation, schedule
from planner.search.problem import Decision, Dependency, Moves, Options, SearchProblem

TICK_S = 1 / 64


def options(*rows: tuple[int, int, float], **bytes_: Iterable[float]) -> Options:
    """Options of (first GPU, width, seconds)."""
    first, width, time_s = (np.array(column) for column in zip(*rows, strict=True))
    fields = {
        "resident_bytes": np.zeros(len(rows)),
        "transient_bytes": np.zeros(len(rows)),
        "layout": np.arange(len(rows)),
    }
    fields |= {name: np.array(list(column)) for name, column in bytes_.items()}
    return Options(first=first, width=width, time_s=time_s, **fields)


def problem(calls: list[Options], edges: list[tuple[int, ...]] = (), **more: Any) -> SearchProblem:  # type: ignore[assignment]
    return SearchProblem(
        gpus=4, capacity_bytes=more.pop("capacity", 10.0), names=tuple("abcdefgh"[: len(calls)]), options=tuple(calls),
        edges=tuple(Dependency(*edge) for edge in edges), **more,
    )  # fmt: skip


def solved(p: SearchProblem, period_s: float) -> tuple[bool, list[Decision]]:
    """Whether the model of a period has a plan, and the decisions that its solution stands for."""
    m = cyclic.model(cyclic.Frame.of(p), round(period_s / TICK_S), TICK_S)
    solver = exact._solver(600.0, 0, 1)
    status = solver.solve(m.cp)
    assert status in (cp_model.OPTIMAL, cp_model.INFEASIBLE), "small models are decided"
    return status == cp_model.OPTIMAL, exact.decode(solver, m) if status == cp_model.OPTIMAL else []


def lone(gpu: int, seconds: float) -> Options:
    return options((gpu, 1, seconds))


ROUNDS = problem(
    [lone(0, 1.0), lone(1, 2.0), lone(0, 1.0), lone(0, 1.0), lone(2, 1.0), lone(0, 1.0), lone(3, 1.0)],
    [(0, 1), (1, 2), (2, 0, 1), (3, 4), (4, 5), (5, 6), (6, 3, 1)],
)
"""Two cycles of 4 s with two seconds each on GPU 0. In 4 s the first one's stand at 0 and 3, so that the second one's
would have to stand at 1 and 2: but those are two seconds apart. With 5 s there is room."""


def test_places_in_time_count_where_no_sum_does() -> None:
    assert relaxation.relax(ROUNDS).bound_s == pytest.approx(4.0)
    assert not solved(ROUNDS, 4.0)[0] and not solved(ROUNDS, 4.9)[0]
    feasible, found = solved(ROUNDS, 5.0)
    assert feasible and min(schedule.cost(ROUNDS, d).period_s for d in found) == pytest.approx(5.0)


def test_a_bound_is_the_period_that_was_ruled_out() -> None:
    """Between 4 and 5 s the middle comes first; it has no plan, and half a second is within the gap."""
    answer = exact.search(ROUNDS, seconds=600.0, gap=0.15)
    assert isinstance(answer, exact.Proved) and answer.period_s == pytest.approx(5.0)
    assert answer.bound_s == pytest.approx(4.5, rel=1e-3)
    closer = exact.search(ROUNDS, seconds=600.0, gap=0.005)
    assert isinstance(closer, exact.Proved) and closer.status is exact.Outcome.PROVED
    assert 5.0 * 0.99 < closer.bound_s <= 5.0


def test_halves_of_the_cluster_are_packed() -> None:
    """Every mesh is two GPUs or four: 4 s on one half stand beside 1 s and 3 s on the other, in any order."""
    halves = [options((0, 2, 4.0), (2, 2, 4.0)), options((0, 2, 1.0), (2, 2, 1.0)), options((2, 2, 3.0), (0, 4, 2.9))]
    p = problem(halves)
    assert cyclic.Frame.of(p).unit == 2
    assert solved(p, 4.0)[0] and not solved(p, 3.9)[0]


def test_seconds_are_rounded_down_to_ticks() -> None:
    m = cyclic.CyclicModel(cyclic.Frame.of(ROUNDS), 100, 0.5)
    assert [m.ticks(s) for s in (0.0, 2.2, 2.4, 2.6)] == [0, 4, 4, 5]


@pytest.mark.parametrize(("transient", "copies", "period_s"), [
    (3.0, 0.0, 2.0),  # 3 + 3 resident and 3 for one at a time: 9 of 10
    (5.0, 0.0, 8.0),  # 11: apart, on halves, each four times as long
    (5.0, 1.0, 2.0),  # the reader's copy is the trainer's own: 6, and 5 less 1
])  # fmt: skip
def test_memory_keeps_calls_apart(transient: float, copies: float, period_s: float) -> None:
    """A reader and its trainer, of a second each on all GPUs, or of four on a half."""
    reader = options(
        (0, 4, 1.0), (0, 2, 4.0), (2, 2, 4.0), resident_bytes=[3.0] * 3, transient_bytes=[transient] * 3,
        copy_bytes=[copies] * 3, layout=[0, 1, 1],
    )  # fmt: skip
    trainer = replace(reader, transient_bytes=np.full(3, min(transient, 4.0)))
    moves = {(1, 0): Moves.of_options(np.zeros((3, 3)))}
    p = problem([reader, trainer], [(0, 1), (1, 0, 1)], moves=moves)
    assert best_period_s(p) == pytest.approx(period_s)
    assert next(seconds for seconds in (2.0, 4.0, 8.0) if solved(p, seconds)[0]) == period_s


def best_period_s(p: SearchProblem) -> float | None:
    return min((schedule.cost(p, d).period_s for d in decisions(p)), default=None)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(p=problems(calls=3, most_options=2))
def test_a_model_rules_out_no_plan(p: SearchProblem) -> None:
    """At the best period of all decisions every model has a solution; what it stands for is legal, and as quick where
    nothing moves and everything fits."""
    best = best_period_s(p)
    if best is None:
        return
    ticks = np.ceil(best / TICK_S) * TICK_S
    feasible, found = solved(p, float(ticks))
    assert feasible
    assert all(schedule.is_legal(p, d) for d in found)
    if not p.moves and fits(p, found[0].choice):
        assert min(schedule.cost(p, d).period_s for d in found) <= ticks + TICK_S * p.n_calls


def test_a_move_takes_its_time_but_for_a_shared_copy() -> None:
    """The reader's weights come from GPU 1 in 2 s: with its 3 s and the trainer's 4 s one round takes 9 s."""
    reader, trainer = lone(0, 3.0), lone(1, 4.0)
    p = problem([reader, trainer], [(0, 1), (1, 0, 1)], moves={(1, 0): Moves.of_options(np.array([[2.0]]))})
    assert solved(p, 9.0)[0] and not solved(p, 8.9)[0]
    assert relaxation.relax(p).bound_s == pytest.approx(9.0)
    second = problem(
        [reader, options((0, 1, 1.0)), trainer],
        [(0, 1), (1, 2), (2, 0, 1), (2, 1, 1)],
        moves={(2, v): Moves.of_options(np.array([[2.0]])) for v in (0, 1)},
    )
    assert best_period_s(second) == 10.0, "the second reader finds the copy of the first"
    assert solved(second, 10.0)[0] and not solved(second, 9.9)[0]


def test_weights_that_are_read_before_the_training_that_changes_them() -> None:
    """The reader's move ends before the trainer begins: a turn that its edge to the trainer keeps as well."""
    moves = {(1, 0): Moves.of_options(np.array([[2.0]]))}
    p = problem([lone(0, 3.0), lone(1, 4.0)], [(0, 1), (1, 0, 1)], moves=moves, turns=(Dependency(0, 1, 0),))
    assert solved(p, 9.0)[0] and not solved(p, 8.9)[0]


def test_a_move_is_rounded_down_by_less_than_a_tick() -> None:
    """192.64, 256.64 and 128.64 ticks in a round: 192 + 256 + 128."""
    moves = {(1, 0): Moves.of_options(np.array([[2.01]]))}
    p = problem([lone(0, 3.01), lone(1, 4.01)], [(0, 1), (1, 0, 1)], moves=moves)
    assert solved(p, 576 * TICK_S)[0] and not solved(p, 575 * TICK_S)[0]


def test_calls_that_must_share_a_mesh_keep_all_of_theirs() -> None:
    """The first call's better option is on half of the mesh that the second one has alone."""
    both = [options((0, 2, 1.0), (0, 4, 2.0), (0, 2, 3.0)), options((0, 4, 1.0))]
    assert dominance.undominated(problem(both, same_mesh=((0, 1),)), 0).tolist() == [0, 1]
    assert dominance.undominated(problem(both), 0).tolist() == [0]


def test_a_bound_from_memory() -> None:
    """Two calls of 1 s where all stays, of 3 s where little does, on four GPUs of 10 bytes: 6 + 6 do not fit. With
    shares x and y of the fast ones 4 (6x + 2 (1 - x) + 6y + 2 (1 - y)) is at most 40, so x + y at most 1.5, and the
    period at least 6 - 2 (x + y) = 3; two transient bytes of one of them more, x + y at most 1: 4."""
    rows = ((0, 4, 1.0), (0, 4, 3.0))
    plain = options(*rows, resident_bytes=[6.0, 2.0])
    assert relaxation.relax(problem([plain, plain])).bound_s == pytest.approx(3.0)
    works = options(*rows, resident_bytes=[6.0, 2.0], transient_bytes=[3.0, 3.0], copy_bytes=[1.0, 1.0])
    assert relaxation.relax(problem([works, plain])).bound_s == pytest.approx(4.0)


def test_bounds_are_rounded_down() -> None:
    """By a part of 1e-9, which rounding in a sum of seconds does not reach."""
    relaxed = relaxation.relax(problem([options((0, 4, 1.0), (0, 4, 3.0))]))
    assert relaxed.bound_s <= 1.0 - 0.9e-9
    assert 3.0 - 4e-9 < relaxed.option_s[0][1] <= 3.0 - 2.5e-9


def test_windows_hold_two_calls_at_least() -> None:
    chain = problem([lone(0, 1.0)] * 3, [(0, 1), (1, 2)])
    assert relaxation.windows(chain) == []
    beside = problem([lone(0, 1.0)] * 4, [(0, 1), (0, 2), (1, 3), (2, 3)])
    assert relaxation.windows(beside) == [relaxation.Window(0, 3, (1, 2))]


def test_cycles_are_all_simple_cycles() -> None:
    edges = [(0, 1), (1, 2), (2, 0, 1), (1, 0, 1), (2, 1, 1), (2, 2, 1)]
    p = problem([lone(0, 1.0)] * 3, edges)
    graph = nx.DiGraph([(u, v) for u, v, *_ in edges if u != v])
    expected = {frozenset(cycle) for cycle in nx.simple_cycles(graph)}
    found = relaxation.cycles(p, [])
    assert len(expected) == len(found) == 3 and {frozenset(cycle) for cycle in found} == expected


def holds(p: SearchProblem, call: int, better: int, worse: int) -> bool:
    """Whether one option is at least as good as another in everything that its call's plans can feel."""
    o = p.options[call]
    ends = o.first + o.width
    grouped = sum(leader == p.leader[call] for leader in p.leader) > 1
    inside = o.first[better] >= o.first[worse] and ends[better] <= ends[worse]
    same = o.first[better] == o.first[worse] and ends[better] == ends[worse]
    least = o.transient_bytes[worse] - (o.shared_bytes[worse] if worse in dominance._may_share(p, call) else 0.0)
    quick = all(
        float(moves.between([better], [k])[0, 0]) <= float(moves.between([worse], [k])[0, 0])
        for (u, _), moves in p.moves.items() if u == call for k in range(moves.shape[1])
    ) and all(
        float(moves.between([k], [better])[0, 0]) <= float(moves.between([k], [worse])[0, 0])
        for (_, v), moves in p.moves.items() if v == call for k in range(moves.shape[0])
    )  # fmt: skip
    return bool(
        (same if grouped else inside)
        and o.time_s[better] <= o.time_s[worse]
        and o.resident_bytes[better] <= o.resident_bytes[worse]
        and o.transient_bytes[better] <= least
        and quick
    )


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(p=problems(calls=3, most_options=5))
def test_options_are_dropped_for_better_ones_alone(p: SearchProblem) -> None:
    """Pair by pair: what is dropped has a better one that stays; what stays and shares no copy has none."""
    for call, o in enumerate(p.options):
        kept = dominance.undominated(p, call).tolist()
        for dropped in set(range(len(o))) - set(kept):
            assert any(holds(p, call, k, dropped) for k in kept)
        alone = call not in p.trainer and all(u != call for u, _ in p.moves)
        if alone:
            assert not any(holds(p, call, a, b) for a, b in itertools.permutations(kept, 2))


@pytest.mark.parametrize("wrong", [
    {"first": [0]}, {"width": [1]}, {"time_s": [1.0]}, {"resident_bytes": [0.0]}, {"layout": [0]},
    {"time_s": [1.0, 0.0]}, {"time_s": [1.0, np.inf]}, {"width": [0, 1]}, {"first": [-1, 0]}, {"layout": [-1, 0]},
    {"resident_bytes": [-1.0, 0.0]}, {"transient_bytes": [0.0, 0.0], "copy_bytes": [1.0, 0.0]},
])  # fmt: skip
def test_options_that_cannot_be_are_refused(wrong: dict[str, list[float]]) -> None:
    fields = {"first": [0, 1], "width": [1, 1], "time_s": [1.0, 1.0], "resident_bytes": [0.0, 0.0],
              "transient_bytes": [1.0, 1.0], "layout": [0, 0]}  # fmt: skip
    Options(**{name: np.array(values) for name, values in fields.items()})
    with pytest.raises(AssertionError):
        Options(**{name: np.array(values) for name, values in (fields | wrong).items()})


MOVES = {(1, 0): Moves.of_options(np.zeros((1, 1)))}


@pytest.mark.parametrize("wrong", [
    {"edges": [(0, 1), (1, 0)]}, {"edges": [(0, 3)]}, {"edges": [(-1, 1)]}, {"edges": [(0, 1, -1)]},
    {"moves": MOVES}, {"moves": MOVES, "edges": [(1, 2, 1)]}, {"moves": MOVES, "edges": [(2, 0, 1)]},
    {"moves": {**MOVES, (2, 0): MOVES[1, 0]}, "edges": [(1, 0, 1), (2, 0, 1)]},
    {"moves": {(1, 0): Moves.of_options(np.zeros((2, 1)))}, "edges": [(1, 0, 1)]},
    {"turns": (Dependency(0, 1, 1),)}, {"turns": (Dependency(0, 3),)},
    {"same_mesh": ((0, 1), (1, 2))}, {"same_mesh": ((0, 3),)},
    {"calls": [lone(0, 1.0), lone(0, 1.0), options((3, 2, 1.0))]},
])  # fmt: skip
def test_problems_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    problem([lone(0, 1.0)] * 3, [(0, 1), (1, 0, 1)], moves=MOVES, turns=(Dependency(0, 1, 0),), same_mesh=((0, 1),))
    with pytest.raises(AssertionError):
        problem(wrong.get("calls", [lone(0, 1.0)] * 3), **{k: v for k, v in wrong.items() if k != "calls"})


def test_a_version_is_that_of_its_own_edge() -> None:
    p = problem([lone(0, 1.0)] * 3, [(0, 1), (1, 0, 2), (1, 0, 3), (2, 0, 1)], moves=MOVES)
    assert p.version == {0: 2}
