"""The steps of the walk, as plain Python: random numbers against Marsaglia's generator, proposals against what they may
reach, acceptance against Metropolis' rate; and where walks begin, against trying all."""

from __future__ import annotations

import importlib.util
import itertools
from collections import Counter
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from small_problems import is_legal, period_s, problems

from planner.search import beginnings, dominance, schedule, shapes
from planner.search.problem import Decision, Dependency, Moves, Options, SearchProblem
from planner.search.tidy import tidy


@pytest.fixture(scope="module")
def walk() -> ModuleType:
    """The kernels uncompiled: the compiler would take longer than these few steps."""
    spec = importlib.util.find_spec("planner.search.kernels")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numba.config.DISABLE_JIT", True, raising=False)
        spec.loader.exec_module(module)
    return module


def options(*rows: tuple[int, int, float, int], resident: float = 0.0) -> Options:
    """Options of (first, width, seconds, layout)."""
    first, width, time_s, layout = (np.array(column) for column in zip(*rows, strict=True))
    nothing = np.zeros(len(rows))
    return Options(
        first=first, width=width, time_s=time_s, resident_bytes=nothing + resident, transient_bytes=nothing,
        layout=layout,
    )  # fmt: skip


LEFT, RIGHT, WHOLE = (0, 2), (2, 2), (0, 4)
A = options((*LEFT, 4.0, 0), (*LEFT, 3.0, 1), (*RIGHT, 4.0, 0), (*RIGHT, 3.5, 1), (*WHOLE, 2.0, 0), (*LEFT, 9.0, 2))
B = options((*LEFT, 1.0, 5), (*LEFT, 2.0, 6), (*RIGHT, 1.0, 5))
C = options((*WHOLE, 1.0, 7), (0, 1, 5.0, 7))


def problem(**changes: Any) -> SearchProblem:
    """Three calls: C waits for A and B, whose meshes C's second option does not have."""
    fields = {
        "gpus": 4,
        "capacity_bytes": 10.0,
        "names": ("a", "b", "c"),
        "options": (A, B, C),
        "edges": (Dependency(0, 2), Dependency(1, 2)),
    }
    return SearchProblem(**(fields | changes))


def marsaglia(state: list[int], bound: int, count: int) -> list[int]:
    """Xorshift RNGs (2003), section 4: t = x ^ (x << 11); x = y; y = z; z = w; w = (w ^ (w >> 19)) ^ (t ^ (t >> 8))."""
    x, y, z, w = state
    found = []
    for _ in range(count):
        t = (x ^ (x << 11)) & 0xFFFFFFFF
        x, y, z, w = y, z, w, (w ^ (w >> 19)) ^ (t ^ (t >> 8))
        found.append(w * bound // 2**32)
    return found


@pytest.mark.parametrize("bound", [1, 2, 7, 1 << 30])
def test_random_numbers_are_marsaglia_s(walk: ModuleType, bound: int) -> None:
    seed = [123456789, 362436069, 521288629, 88675123]
    random = np.array(seed, np.int64)
    assert [int(walk.draw(random, bound)) for _ in range(200)] == marsaglia(seed, bound, 200)


def draws(seed: int = 1) -> np.ndarray:
    return np.array([seed, 362436069, 521288629, 88675123], np.int64)


def test_an_option_on_the_mesh_of_another_call(walk: ModuleType) -> None:
    """On the left half A has options 0, 1 and 5, in time 3, 4 and 9: one of the fastest k, k even in 1 to 3."""
    t, random = schedule.tables(problem()), draws()
    x = schedule.rows(Decision((4, 0, 0), (0, 1, 2), (0, 0, 0)))
    found = Counter(int(walk.pick_option(t, random, x, 0, 1)) for _ in range(3000))
    shares = {1: (1 + 1 / 2 + 1 / 3) / 3, 0: (1 / 2 + 1 / 3) / 3, 5: 1 / 9}
    assert set(found) == set(shares)
    for option, share in shares.items():
        assert found[option] / 3000 == pytest.approx(share, abs=0.03)
    x = schedule.rows(Decision((4, 0, 1), (0, 1, 2), (0, 0, 0)))
    assert {int(walk.pick_option(t, random, x, 0, 2)) for _ in range(300)} == set(range(6)), "no option there: anywhere"


def test_an_option_of_its_own(walk: ModuleType) -> None:
    """B on the left, and A and C on the whole: of ten draws three are anywhere, two the same layout elsewhere, two
    the same mesh, three the mesh of one of the three calls, where B has none twice in three."""
    t, random = schedule.tables(problem()), draws(5)
    x = schedule.rows(Decision((4, 1, 0), (0, 1, 2), (0, 0, 0)))
    found = Counter(int(walk.pick_option(t, random, x, 1, -1)) for _ in range(20_000))
    # Anywhere: a third each is the row whose mesh (by time) is drawn from: left (two rows of three) or right.
    on_left = {0: 3 / 4, 1: 1 / 4}
    anywhere = {i: 2 / 3 * on_left.get(i, 0.0) + (1 / 3) * (i == 2) for i in range(3)}
    layout = {0: 0.0, 1: 1.0, 2: 0.0}
    for option in range(3):
        other = 1 / 3 * on_left.get(option, 0.0) + 2 / 3 * 1 / 3
        share = 0.3 * anywhere[option] + 0.2 * layout[option] + 0.2 * on_left.get(option, 0.0) + 0.3 * other
        assert found[option] / 20_000 == pytest.approx(share, abs=0.015), option


@pytest.mark.parametrize("most", [1, 3])
def test_a_call_finds_any_place_and_lag_and_the_others_keep_theirs(walk: ModuleType, most: int) -> None:
    random, places, lags = draws(), Counter[int](), Counter[int]()
    for _ in range(4000):
        x = np.array([[0] * 5, [3, 1, 4, 0, 2], [0, 1, 0, 1, 1]], np.int64)
        walk.reorder(random, x, 4, most)
        order = x[1].tolist()
        assert [call for call in order if call != 4] == [3, 1, 0, 2] and x[2].tolist()[:4] == [0, 1, 0, 1]
        places[order.index(4)] += 1
        lags[int(x[2, 4])] += 1
    assert set(places) == set(range(5)) and set(lags) == set(range(most + 1))
    assert all(abs(count / 4000 - 1 / 5) < 0.03 for count in places.values())
    assert lags[1] / 4000 == pytest.approx(0.5, abs=0.03), "its own lag half the time"
    assert all(abs(lags[lag] / 4000 - 0.5 / most) < 0.03 for lag in lags if lag != 1)


def test_proposals_change_one_thing_or_two_meshes(walk: ModuleType) -> None:
    t, random = schedule.tables(problem()), draws()
    before = schedule.rows(Decision((4, 1, 0), (0, 1, 2), (0, 0, 0)))
    kinds, lags = Counter[tuple[int, bool]](), set()
    for _ in range(4000):
        x = before.copy()
        walk.propose(t, random, x)
        changed = int((x[0] != before[0]).sum())
        moved = bool((x[1:] != before[1:]).any())
        assert changed <= 2 and all(0 <= x[0, c] < len(o) for c, o in enumerate(problem().options))
        assert sorted(x[1].tolist()) == [0, 1, 2]
        kinds[changed, moved] += 1
        lags |= set(x[2].tolist())
    assert lags == {0, 1}
    moves = sum(count for (_, moved), count in kinds.items() if moved) / 4000
    assert moves == pytest.approx(0.25 * (1 - 1 / 3 * 1 / 2), abs=0.02), "a quarter, less those that change nothing"
    both = sum(count for (changed, moved), count in kinds.items() if changed and moved) / 4000
    assert 0 < both < 0.05, "one in twenty does both"


@pytest.mark.parametrize(("kind", "trade"), [(0, True), (14, True), (15, False), (29, False), (30, False), (74, False)])
def test_calls_exchange_meshes(walk: ModuleType, kind: int, trade: bool) -> None:
    """A on the right and B on the left: below 15 each takes the other's mesh, below 30 both may go anywhere."""
    t, random, p, seen = schedule.tables(problem()), draws(), problem(), set()
    for _ in range(200):
        x = schedule.rows(Decision((2, 0, 0), (0, 1, 2), (0, 0, 0)))
        walk.choose_anew(t, random, x, 0, 1, kind)
        seen.add((p.mesh(0, int(x[0, 0])), p.mesh(1, int(x[0, 1]))))
    assert (seen == {(LEFT, RIGHT)}) == trade
    assert ({other for _, other in seen} == {LEFT}) == (kind >= 30), "of 30 and more only one call changes"


def test_calls_that_share_a_mesh_move_together(walk: ModuleType) -> None:
    together = problem(options=(A, B, options((*LEFT, 1.0, 7), (*RIGHT, 1.0, 7))), same_mesh=((0, 1, 2),))
    t, random, kept = schedule.tables(together), draws(), 0
    for _ in range(600):
        x = schedule.rows(Decision((0, 0, 0), (0, 1, 2), (0, 0, 0)))
        walk.propose(t, random, x)
        meshes = {together.mesh(c, int(x[0, c])) for c in range(3)}
        kept += len(meshes) == 1
        assert len(meshes) == 1 or WHOLE in meshes, "only A has options on the whole"
    assert kept > 400


def chain(
    walk: ModuleType, p: SearchProblem, start: Decision, temperature: float, steps: int, seed: int = 1
) -> list[Any]:
    """(present, best, costs) after every step."""
    t = schedule.tables(p)
    now, random = schedule.rows(start), draws(seed)
    best, costs = now.copy(), np.full(5, np.nan)
    costs[walk.BEST] = np.inf
    scratch, seen = schedule.scratch(t), []
    for _ in range(steps):
        walk.metropolis(t, scratch, now, best, random, costs, temperature, 1)
        seen.append((now.copy(), best.copy(), costs.copy()))
    return seen


def objective_s(walk: ModuleType, p: SearchProblem, rows: np.ndarray) -> float:
    decision = Decision(*(tuple(map(int, row)) for row in rows))
    cost = schedule.evaluate(schedule.tables(p), decision)
    return cost.objective_s * (1 + walk.MEMORY_PENALTY * cost.overflow_bytes / p.capacity_bytes)


def test_a_cold_chain_never_rises_and_keeps_the_best_that_fits(walk: ModuleType) -> None:
    full = options((*LEFT, 4.0, 0), (*RIGHT, 5.0, 0), resident=6.0)
    p = problem(options=(full, full, C), names=("a", "b", "c"))
    start = Decision((0, 0, 0), (0, 1, 2), (0, 0, 0))
    seen = chain(walk, p, start, 1e-12, 60)
    present = [costs[walk.PRESENT] for _, _, costs in seen]
    assert all(b <= a for a, b in itertools.pairwise(present)) and present[-1] < present[0]
    for now, best, costs in seen:
        assert costs[walk.PRESENT] == pytest.approx(objective_s(walk, p, now))
        if np.isfinite(costs[walk.BEST]):
            assert costs[walk.BEST] == pytest.approx(objective_s(walk, p, best))
            assert {int(best[0, 0]), int(best[0, 1])} == {0, 1}, "together they do not fit on a half"
    assert not np.isfinite(seen[0][2][walk.BEST]) and np.isfinite(seen[-1][2][walk.BEST])


def test_a_rise_is_accepted_at_metropolis_rate(walk: ModuleType) -> None:
    """Two options, one slower by a second: at temperature T it is taken exp(-1 / T) times as often as when hot."""
    p = SearchProblem(
        gpus=4, capacity_bytes=1.0, names=("a",), options=(options((*LEFT, 4.0, 0), (*LEFT, 5.0, 1)),), edges=()
    )
    start = Decision((0,), (0,), (0,))

    def taken(temperature: float) -> float:
        t, random, rises, count = schedule.tables(p), draws(3), 0, 2500
        scratch = schedule.scratch(t)
        for _ in range(count):
            now, costs = schedule.rows(start), np.full(5, np.nan)
            costs[walk.BEST] = np.inf
            walk.metropolis(t, scratch, now, now.copy(), random, costs, temperature, 1)
            rises += int(now[0, 0])
        return rises / count

    hot = taken(1e9)
    rise = 1.0 + walk.LATENCY_WEIGHT
    for temperature in (0.5, 2.0):
        assert taken(temperature) / hot == pytest.approx(np.exp(-rise / temperature), rel=0.15)
    assert taken(1e-3) == 0.0


def test_walks_begin_at_the_fastest_and_anywhere() -> None:
    assert beginnings.fastest(problem()) == problem().plain((4, 0, 0))
    shared = problem(same_mesh=((0, 1),))
    assert beginnings.fastest(shared) == shared.plain((1, 0, 0)), "3 + 1 s on the left, 3.5 + 1 s on the right"
    nowhere = problem(same_mesh=((1, 2),))
    assert beginnings.fastest(nowhere) is None
    random = np.random.default_rng(0)
    found = {tuple(beginnings.anywhere(shared, lambda bound: int(random.integers(bound)))) for _ in range(800)}
    on_one = {(a, b) for a in range(6) for b in range(3) if shared.mesh(0, a) == shared.mesh(1, b)}
    assert found == {(a, b, c) for a, b in on_one for c in range(2)}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(p=problems(calls=3, most_options=2))
def test_what_is_legal_is_so_for_the_walk(walk: ModuleType, p: SearchProblem) -> None:
    """Every order and lag of a small problem; options on one mesh where they must be."""
    t, n = schedule.tables(p), p.n_calls
    choice = next((c for c in itertools.product(*(range(len(o)) for o in p.options)) if p.keeps_meshes(c)), None)
    if choice is None:
        return
    for order, lag in itertools.product(
        itertools.permutations(range(n)), itertools.product(range(p.most_lag + 1), repeat=n)
    ):
        decision = Decision(choice, order, lag)
        found = walk.is_legal(t, schedule.rows(decision), schedule.scratch(t))
        assert bool(found) == is_legal(p, decision), decision


QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@QUICK
@given(p=problems(calls=3, most_options=6))
def test_shapes_are_options_that_differ_in_place_alone(p: SearchProblem) -> None:
    for call, o in enumerate(p.options):
        found = shapes.shapes_of(p, call)
        keys = list(zip(o.width, o.time_s, o.resident_bytes, o.transient_bytes, o.shared_bytes, o.layout, strict=True))
        assert sorted(i for members in found.members for i in members) == list(range(len(o)))
        assert len(found) == len(set(keys))
        for s, members in enumerate(found.members):
            assert {keys[i] for i in members} == {
                (found.width[s], found.time_s[s], found.resident_bytes[s], found.transient_bytes[s],
                 found.shared_bytes[s], found.layout[s])
            }  # fmt: skip
    for u, v in p.moves:
        rows, columns = shapes.shapes_of(p, u), shapes.shapes_of(p, v)
        table = shapes.move_table(p, u, v, rows, columns)
        for (i, sources), (j, targets) in itertools.product(enumerate(rows.members), enumerate(columns.members)):
            seconds = {
                (a, b): float(p.moves[u, v].between([a], [b])[0, 0]) for a in sources for b in targets
            }  # fmt: skip
            assert table.anywhere_s[i, j] == min(seconds.values())
            own = rows.width[i] == columns.width[j] and rows.layout[i] == columns.layout[j]
            apart = [s for (a, b), s in seconds.items() if not own or p.mesh(u, a) != p.mesh(v, b)]
            assert table.apart_s[i, j] == min(apart, default=table.anywhere_s[i, j])


def test_the_unit_of_the_gpu_axis() -> None:
    def unit(gpus: int, *meshes: tuple[int, int]) -> int:
        rows = [(*mesh, 1.0, 0) for mesh in meshes]
        return shapes.gpu_unit(
            SearchProblem(gpus=gpus, capacity_bytes=1, names=("a",), options=(options(*rows),), edges=())
        )

    assert unit(16, (0, 8), (8, 8)) == 8 and unit(16, (0, 16)) == 16
    assert unit(16, (4, 4), (0, 8)) == 4 and unit(24, (0, 16)) == 8 and unit(16, (0, 8), (3, 1)) == 1


def test_what_cannot_be_is_left_out_first() -> None:
    """Options that exceed a GPU alone, then those on meshes that a partner has not; the numbers lead back."""
    heavy = Options(
        first=np.array([0, 0, 2]), width=np.array([4, 2, 2]), time_s=np.ones(3), layout=np.zeros(3),
        resident_bytes=np.array([10.0, 10.0, 3.0]), transient_bytes=np.array([1.0, 0.0, 8.0]),
        copy_bytes=np.array([0.0, 0.0, 1.0]),
    )  # fmt: skip
    p = problem(options=(heavy, B, C))
    assert dominance.overweight(p, 0).tolist() == [0], "11 bytes; 10 and 3 + 8 - 1 are just right"
    light = dominance.light(p)
    assert light is not None and light.counts == {"exceeds a GPU's memory alone": 1}
    assert [kept.tolist() for kept in light.keep] == [[1, 2], [0, 1, 2], [0, 1]]
    assert light.whole(Decision((1, 2, 0), (1, 0, 2), (0, 1, 0))) == Decision((2, 2, 0), (1, 0, 2), (0, 1, 0))
    assert light.begin(Decision((2, 2, 0), (0, 1, 2), (0, 0, 0))) == Decision((1, 2, 0), (0, 1, 2), (0, 0, 0))
    assert light.begin(Decision((0, 2, 0), (0, 1, 2), (0, 0, 0))) is None
    shared = problem(options=(A, B, C), same_mesh=((0, 1),))
    assert dominance.stray(shared, 0).tolist() == [4] and dominance.stray(shared, 1).tolist() == []
    assert dominance.stray(shared, 2).tolist() == []
    assert dominance.light(problem(same_mesh=((1, 2),))) is None
    assert dominance.light(problem(capacity_bytes=0.5, options=(heavy, B, C))) is None


@pytest.mark.parametrize(("version", "ordered", "expected"), [
    (1, True, {0: (), 1: (0,)}),
    (1, False, {0: (1,), 1: (0,)}),
    (2, True, {0: (), 1: ()}),
])  # fmt: skip
def test_copies_are_shared_with_earlier_readers_of_the_same_version(
    version: int, ordered: bool, expected: dict[int, tuple[int, ...]]
) -> None:
    """Two calls read what the third trains: one that must come later made no copy, and another version is another."""
    own = options((*LEFT, 1.0, 0))
    edges = [Dependency(2, 0, 1), Dependency(2, 1, version), Dependency(1, 2)]
    moves = {(2, v): Moves.of_options(np.array([[1.0]])) for v in (0, 1)}
    p = problem(options=(own,) * 3, moves=moves, edges=(*edges, *([Dependency(0, 1)] if ordered else [])))
    assert p.earlier_readers == expected and p.version == {0: 1, 1: version} and p.trainer == {0: 2, 1: 2}


def test_moves_by_layout_are_those_by_option() -> None:
    seconds = np.array([[1.0, 2.0, 1.0], [0.0, 5.0, 0.0], [1.0, 2.0, 1.0]])
    whole = Moves.of_options(seconds)
    alike = Moves(np.array([[1.0, 2.0], [0.0, 5.0]]), np.array([0, 1, 0]), np.array([0, 1, 0]))
    for moves in (whole, alike, alike.take(np.arange(3), np.arange(3))):
        assert moves.shape == (3, 3) and (moves.between(np.arange(3), np.arange(3)) == seconds).all()
        assert moves.least_into().tolist() == [0.0, 2.0, 0.0]
    some = alike.take(np.array([2, 0]), np.array([1]))
    assert some.between(np.arange(2), np.arange(1)).tolist() == [[2.0], [2.0]] and some.seconds.shape == (1, 1)


@QUICK
@given(p=problems(calls=3, most_options=3))
def test_the_cost_of_one_decision_needs_no_other_options(p: SearchProblem) -> None:
    choice = tuple(len(o) - 1 for o in p.options)
    if not p.keeps_meshes(choice):
        return
    decision = p.plain(choice)
    assert schedule.cost(p, decision) == schedule.evaluate(schedule.tables(p), decision)
    assert schedule.cost(p, decision).period_s == pytest.approx(period_s(p, decision))


def test_tidying_drops_what_brings_nothing() -> None:
    """A lag and an order that gain nothing go, and a slow twin of a layout; a lag that gains stays."""
    slow = options((*LEFT, 4.0, 0), (*LEFT, 2.0, 0), (*LEFT, 1.0, 1))
    p = problem(options=(slow, options((*LEFT, 3.0, 0)), C), edges=(Dependency(0, 2), Dependency(1, 2)))
    assert tidy(p, Decision((0, 0, 0), (1, 0, 2), (0, 0, 1))) == Decision((1, 0, 0), (0, 1, 2), (0, 0, 0))
    halves = SearchProblem(
        gpus=4, capacity_bytes=1.0, names=("a", "b"), options=(options((*LEFT, 3.0, 0)), options((*RIGHT, 3.0, 0))),
        edges=(Dependency(0, 1), Dependency(1, 0, 1)),
    )  # fmt: skip
    kept = tidy(halves, Decision((0, 0), (0, 1), (0, 0)))
    assert kept == Decision((0, 0), (0, 1), (0, 0))
    ahead = SearchProblem(
        gpus=4, capacity_bytes=1.0, names=("a", "b"), options=(options((*LEFT, 3.0, 0)), options((*RIGHT, 3.0, 0))),
        edges=(Dependency(0, 1), Dependency(1, 0, 2)),
    )  # fmt: skip
    assert schedule.cost(ahead, tidy(ahead, Decision((0, 0), (1, 0), (0, 1)))).period_s == 3.0
