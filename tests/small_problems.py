"""Small search problems, and their costs by the book: an independent reference for the planner's kernels and solvers.

Nothing is shared with `planner.search.kernels`: every GPU has a free time, many periods are played, and the best
decision is found by trying them all.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from planner.search.problem import Decision, Dependency, Moves, Options, SearchProblem
from plans.errors import SpecError
from plans.graph import least_lags

TESTS = os.path.dirname(__file__)
GPUS = 4
MESHES = ((0, 4), (0, 2), (2, 2), (0, 1), (1, 1), (3, 1))


def gpus_of(problem: SearchProblem, decision: Decision, call: int) -> range:
    """GPUs of the call's mesh."""
    options, i = problem.options[call], decision.choice[call]
    return range(int(options.first[i]), int(options.first[i] + options.width[i]))


def by_layout(seconds: np.ndarray) -> Moves:
    """Options with equal times to and from all others share a layout."""
    rows, row = np.unique(seconds, axis=0, return_inverse=True)
    columns, column = np.unique(rows, axis=1, return_inverse=True)
    return Moves(columns, row.reshape(-1), column.reshape(-1))


def move_seconds(problem: SearchProblem, decision: Decision, call: int) -> tuple[int, float]:
    """(trainer, seconds) of the reallocation before `call`; (-1, 0) where there is none."""
    for (u, v), moves in problem.moves.items():
        if v == call:
            return u, float(moves.between([decision.choice[u]], [decision.choice[v]])[0, 0])
    return -1, 0.0


def has_copy(problem: SearchProblem, decision: Decision, call: int) -> bool:
    """Whether a call before this one in the order reads the same version in the same layout with the same lag."""

    def copy(c: int) -> tuple[object, ...]:
        u, _ = move_seconds(problem, decision, c)
        back = [e.distance for e in problem.edges if (e.source, e.target) == (u, c) and e.distance > 0]
        layout = problem.options[c].layout[decision.choice[c]]
        return u, back and min(back), decision.lag[c], gpus_of(problem, decision, c), int(layout)

    before = decision.order[: decision.order.index(call)]
    return any(copy(c) == copy(call) for c in before)


@dataclass(frozen=True)
class Turn:
    """What is the same for a call in every period: its GPUs and seconds, the calls that it waits for, (call, iterations
    before), and the move before it: seconds, the GPUs that it holds, and which training's weights it moves."""

    call: int
    lag: int
    mesh: range
    seconds: float
    waits: tuple[tuple[int, int], ...]
    move_s: float = 0.0
    held: tuple[int, ...] = ()
    trained: tuple[int, int] = (-1, 0)


def turn_of(problem: SearchProblem, decision: Decision, c: int) -> Turn:
    """The turn of a call."""
    mesh, seconds = gpus_of(problem, decision, c), float(problem.options[c].time_s[decision.choice[c]])
    waits = tuple((e.source, e.distance) for e in problem.edges if e.target == c)
    turn = Turn(c, decision.lag[c], mesh, seconds, waits)
    u, move_s = move_seconds(problem, decision, c)
    if not move_s > 0 or has_copy(problem, decision, c):
        return turn
    distance = min(e.distance for e in problem.edges if (e.source, e.target) == (u, c) and e.distance > 0)
    held = tuple({*mesh, *gpus_of(problem, decision, u)})
    return replace(turn, move_s=move_s, held=held, trained=(u, distance))


def play(problem: SearchProblem, decision: Decision, periods: int) -> list[dict[int, float]]:
    """Per period the end of every call that ran in it, starting from idle GPUs."""
    free = [0.0] * problem.gpus
    end: dict[tuple[int, int], float] = {}
    turns = [turn_of(problem, decision, c) for c in decision.order]
    history = []
    for p in range(periods):
        ends = {}
        for turn in turns:
            t = p - turn.lag
            if t < 0:
                continue
            if turn.held:
                u, distance = turn.trained
                begin = max([free[g] for g in turn.held] + [end.get((u, t - distance), 0.0)])
                for g in turn.held:
                    free[g] = begin + turn.move_s
            begin = max([free[g] for g in turn.mesh])
            for source, distance in turn.waits:
                if t >= distance:
                    begin = max(begin, end[source, t - distance])
            end[turn.call, t] = ends[turn.call] = begin + turn.seconds
            for g in turn.mesh:
                free[g] = end[turn.call, t]
        history.append(ends)
    return history


def period_s(problem: SearchProblem, decision: Decision) -> float:
    """Growth of the ends over many periods; 120 is a multiple of every short cycle."""
    history = play(problem, decision, 241)
    return max(history[240][c] - history[120][c] for c in range(problem.n_calls)) / 120


def latency_s(problem: SearchProblem, decision: Decision) -> float:
    """One iteration alone: call by call in the order of its periods, on idle GPUs, with moves."""
    free, end = [0.0] * problem.gpus, dict[int, float]()
    for c in sorted(range(problem.n_calls), key=lambda c: (decision.lag[c], decision.order.index(c))):
        mesh = gpus_of(problem, decision, c)
        u, seconds = move_seconds(problem, decision, c)
        if seconds > 0 and not has_copy(problem, decision, c):
            held = {*mesh, *gpus_of(problem, decision, u)}
            begin = max(free[g] for g in held)
            for g in held:
                free[g] = begin + seconds
        begin = max(free[g] for g in mesh)
        for e in problem.edges:
            if e.target == c and e.distance == 0:
                begin = max(begin, end[e.source])
        end[c] = begin + float(problem.options[c].time_s[decision.choice[c]])
        for g in mesh:
            free[g] = end[c]
    return max(end.values())


def fits(problem: SearchProblem, choice: tuple[int, ...]) -> bool:
    """Memory of every GPU: all resident bytes, and the most transient ones, less what a shared copy saves; and one mesh
    where there must be one."""
    decision = problem.plain(choice)
    if any(len({gpus_of(problem, decision, c) for c in group}) > 1 for group in problem.same_mesh):
        return False
    for gpu in range(problem.gpus):
        resident, transient = 0.0, [0.0]
        for c, i in enumerate(choice):
            o = problem.options[c]
            if gpu in gpus_of(problem, decision, c):
                resident += float(o.resident_bytes[i])
                u, _ = move_seconds(problem, decision, c)
                shares = (
                    u >= 0
                    and gpus_of(problem, decision, u) == gpus_of(problem, decision, c)
                    and problem.options[u].layout[choice[u]] == o.layout[i]
                )
                transient.append(float(o.transient_bytes[i] - (o.shared_bytes[i] if shares else 0.0)))
        if resident + max(transient) > problem.capacity_bytes:
            return False
    return True


def is_legal(problem: SearchProblem, decision: Decision) -> bool:
    """Sources come first in the sequence of periods."""

    def at(call: int, back: int) -> tuple[int, int]:
        return decision.lag[call] - back, decision.order.index(call)

    edges = [*problem.edges, *problem.turns]
    return all(at(e.source, e.distance) < at(e.target, 0) for e in edges if e.source != e.target)


def decisions(problem: SearchProblem) -> Iterator[Decision]:
    """All legal decisions that fit."""
    n = problem.n_calls
    sequences = [
        (order, lag)
        for order in itertools.permutations(range(n))
        for lag in itertools.product(range(problem.most_lag + 1), repeat=n)
        if is_legal(problem, Decision((0,) * n, order, lag))
    ]
    for choice in itertools.product(*(range(len(o)) for o in problem.options)):
        if fits(problem, choice):
            yield from (Decision(choice, order, lag) for order, lag in sequences)


def best_objective_s(problem: SearchProblem, weight: float) -> float | None:
    """Least period + weight x latency over all decisions; None where nothing fits."""
    costs = (period_s(problem, d) + weight * latency_s(problem, d) for d in decisions(problem))
    return min(costs, default=None)


@st.composite
def options(draw: st.DrawFn, most: int) -> Options:
    """Up to `most` options of one call, with small whole numbers."""
    n = draw(st.integers(1, most))
    whole = st.integers(0, 4)
    meshes = [draw(st.sampled_from(MESHES)) for _ in range(n)]
    shared = [draw(whole) for _ in range(n)]
    return Options(
        first=np.array([m[0] for m in meshes]),
        width=np.array([m[1] for m in meshes]),
        time_s=np.array([float(draw(st.integers(1, 9))) for _ in range(n)]),
        resident_bytes=np.array([float(draw(whole)) for _ in range(n)]),
        transient_bytes=np.array([float(s + draw(whole)) for s in shared]),
        layout=np.array([draw(st.integers(0, 1)) for _ in range(n)]),
        copy_bytes=np.array([float(s) for s in shared]),
    )


@st.composite
def moves_between(draw: st.DrawFn, a: Options, b: Options) -> np.ndarray:
    """Whole seconds of reallocation, none where mesh and layout are the same."""
    seconds = np.array([[float(draw(st.integers(0, 3))) for _ in range(len(b))] for _ in range(len(a))])
    same = (a.first[:, None] == b.first) & (a.width[:, None] == b.width) & (a.layout[:, None] == b.layout)
    return np.where(same, 0.0, seconds)


def _consistent(calls: int, waits: list[tuple[int, int, int]]) -> bool:
    try:
        least_lags(range(calls), waits)
    except SpecError:
        return False
    return True


@st.composite
def problems(draw: st.DrawFn, calls: int = 3, most_options: int = 3, together: bool = True) -> SearchProblem:
    """A random graph: forward data edges, the last call may train a model that earlier calls read, exactly so many
    iterations old. With `together`, the first and the last call may have to share a mesh."""
    n = draw(st.integers(1, calls))
    candidates = tuple(draw(options(most_options)) for _ in range(n))
    edges = [Dependency(u, v) for u in range(n) for v in range(u + 1, n) if draw(st.booleans())]
    moves, turns = {}, []
    for v in range(n - 1):
        if draw(st.booleans()):
            edges.append(Dependency(n - 1, v, draw(st.sampled_from((1, 1, 2)))))
            turns += [Dependency(v, n - 1, 1 - edges[-1].distance)] if draw(st.booleans()) else []
            moves[n - 1, v] = by_layout(draw(moves_between(candidates[n - 1], candidates[v])))
    if draw(st.booleans()):
        edges.append(Dependency(n - 1, n - 1, 1))
    waits = [(e.source, e.target, e.distance) for e in (*edges, *turns)]
    if turns and not _consistent(n, waits):  # a call cannot read what an older version waits for
        turns = []
    return SearchProblem(
        gpus=GPUS,
        capacity_bytes=float(draw(st.integers(4, 12))),
        names=tuple(f"call{c}" for c in range(n)),
        options=candidates,
        edges=tuple(edges),
        moves=moves,
        turns=tuple(turns),
        same_mesh=((0, n - 1),) if together and n > 1 and draw(st.integers(0, 3)) == 0 else (),
    )


def call(name: str, model: str, kind: str) -> dict[str, str]:
    return {"name": name, "model": model, "kind": kind}


def random_table(random: np.random.Generator) -> dict:
    """A PPO-like table on two nodes."""
    calls = [
        call("gen", "actor", "generate"),
        call("rew", "reward", "inference"),
        call("val", "critic", "inference"),
        call("train", "actor", "train_step"),
        call("fit", "critic", "train_step"),
    ]
    strategies, meshes = ((1, 1, 4), (1, 2, 2), (1, 4, 1)), ((0, 4), (4, 4), (0, 8), (8, 8), (0, 16))
    rows = {
        c["name"]: [
            [*mesh, *s, int(random.integers(1, 9) * 1e6), int(random.integers(20, 50)), int(random.integers(0, 20))]
            for mesh in meshes
            for s in strategies
        ]
        for c in calls
    }
    pairs = itertools.product(strategies, strategies)
    return {
        "n_nodes": 2,
        "gpus_per_node": 8,
        "gpu_mem": 80,
        "calls": calls,
        "edges": [["gen", "rew"], ["gen", "val"], ["rew", "train"], ["val", "train"], ["val", "fit"], ["rew", "fit"]],
        "size_key": {"actor": "7", "reward": "7", "critic": "13"},
        "options": rows,
        "realloc": {"7": {",".join(map(str, a + b)): int(random.integers(1, 3) * 1e6) for a, b in pairs}},
    }
