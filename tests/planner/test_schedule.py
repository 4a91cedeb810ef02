"""The compiled cost of a decision against a play on GPUs, and the benchmark's rules against a replay of them."""

from __future__ import annotations

import heapq
import os
import subprocess
import sys

import fixed_tables
import numpy as np
import pytest
import readiness
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_problems import TESTS, call, decisions, fits, is_legal, latency_s, period_s, problems, random_table

from planner.search import dominance, schedule
from planner.search.problem import Decision, SearchProblem

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@QUICK
@given(problem=problems(calls=4, together=False), data=st.data())
def test_cost_equals_play_on_gpus(problem: SearchProblem, data: st.DataObject) -> None:
    n = problem.n_calls
    choice = tuple(data.draw(st.integers(0, len(o) - 1)) for o in problem.options)
    order = tuple(data.draw(st.permutations(range(n))))
    lag = tuple(data.draw(st.integers(0, problem.most_lag)) for _ in range(n))
    decision = Decision(choice, order, lag)
    legal = is_legal(problem, decision)
    assert schedule.is_legal(problem, decision) == legal
    decision = decision if legal else problem.plain(choice)
    cost = schedule.evaluate(schedule.tables(problem), decision)
    assert cost.period_s == pytest.approx(period_s(problem, decision), abs=1e-9)
    assert cost.latency_s == pytest.approx(latency_s(problem, decision), abs=1e-9)
    assert (cost.overflow_bytes == 0) == fits(problem, choice)


@QUICK
@given(problem=problems(calls=2, most_options=4))
def test_dominance_keeps_an_optimum(problem: SearchProblem) -> None:
    smaller = dominance.filtered(problem)
    best = min((period_s(problem, d) for d in decisions(problem)), default=None)
    if smaller is None:
        assert best is None
        return
    assert min((period_s(smaller.problem, d) for d in decisions(smaller.problem)), default=None) == best
    assert sum(smaller.counts.values()) == sum(map(len, problem.options)) - sum(map(len, smaller.problem.options))


def test_calls_on_disjoint_meshes_overlap_across_iterations() -> None:
    """Two calls in a row on halves of the cluster: a pipeline, whose period is the longer of the two."""
    table = random_table(np.random.default_rng(0))
    table |= {"n_nodes": 1, "calls": [call("a", "m", "inference"), call("b", "n", "inference")], "edges": [["a", "b"]]}
    table["options"] = {"a": [[0, 4, 1, 4, 1, 3_000_000, 1, 0]], "b": [[4, 4, 1, 4, 1, 5_000_000, 1, 0]]}
    problem = fixed_tables.problem_of(table)
    cost = schedule.evaluate(schedule.tables(problem), problem.plain((0, 0)))
    assert (cost.period_s, cost.latency_s) == (5.0, 8.0)


def replay(table: dict, plan: dict[str, int], iterations: int = 5) -> float:
    """The rules of the benchmark, event by event on every GPU."""
    names = [c["name"] for c in table["calls"]]
    model = {c["name"]: c["model"] for c in table["calls"]}
    trainer = {c["model"]: c["name"] for c in table["calls"] if c["kind"] == "train_step"}
    option = {name: table["options"][name][i] for name, i in plan.items()}
    shard = {"7": fixed_tables.parameters(7), "13": fixed_tables.parameters(13)}

    def sources(name: str, t: int) -> set[tuple[str, int]]:
        turn = [x for x in names if model[x] == model[name]]
        k = turn.index(name)
        before = {(turn[k - 1], t)} if k else {(turn[-1], t - 1)}
        return {x for x in {(a, t) for a, b in table["edges"] if b == name} | before if x[1] >= 0}

    def move(name: str) -> float:
        a, b, size = option[trainer[model[name]]], option[name], table["size_key"][model[name]]
        if a[:5] == b[:5]:
            return 0.0
        listed = table["realloc"].get(size, {}).get(",".join(map(str, a[2:5] + b[2:5])), 0)
        if a[2:5] == b[2:5] or listed == 0:
            listed = int((2 * shard[size] / (b[2] * b[3]) / 25e9 + 0.02) * 1e6)
        return listed / 1e6

    free, end, waiting = dict.fromkeys(range(16), 0.0), {}, {(x, t) for x in names for t in range(iterations)}
    queue: list[tuple[float, int, int]] = []
    queued = set()
    while waiting:
        for name, t in waiting - queued:
            if all(s in end for s in sources(name, t)):
                ready = max((end[s] for s in sources(name, t)), default=0.0)
                heapq.heappush(queue, (ready, names.index(name), t))
                queued.add((name, t))
        ready, k, t = heapq.heappop(queue)
        name = names[k]
        mesh = set(range(option[name][0], option[name][0] + option[name][1]))
        seconds = move(name) if trainer.get(model[name], name) != name else 0.0
        other = option[trainer[model[name]]] if seconds else option[name]
        home = set(range(other[0], other[0] + other[1]))
        start = max([ready, *(free[g] for g in mesh | home)])
        free |= dict.fromkeys(home, start + seconds)
        end[name, t] = start + seconds + option[name][5] / 1e6
        free |= dict.fromkeys(mesh, end[name, t])
        waiting.remove((name, t))
    return max(end.values())


@pytest.mark.parametrize("seed", range(20))
def test_readiness_equals_replay(seed: int) -> None:
    random = np.random.default_rng(seed)
    table = random_table(random)
    problem = fixed_tables.problem_of(table)
    t = schedule.tables(problem)
    for _ in range(10):
        plan = {name: int(random.integers(len(rows))) for name, rows in table["options"].items()}
        choice = tuple(plan[name] for name in problem.names)
        assert readiness.makespan_s(t, choice) == pytest.approx(replay(table, plan), abs=1e-9)


def test_same_numbers_without_compiler() -> None:
    """Plain Python takes the same walk as compiled code, to the last bit."""
    script = (
        "import numpy as np; from small_problems import random_table; import fixed_tables;"
        "from planner.search import kernels, mcmc; import readiness;"
        "p = fixed_tables.problem_of(random_table(np.random.default_rng(3)));"
        "f = [mcmc.search(p, seed=5, evaluations=900, loop=r.metropolis) for r in (kernels, readiness)];"
        "print([(x.decision, x.objective_s.hex()) for x in f])"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "NUMBA_DISABLE_JIT": flag, "PYTHONPATH": os.pathsep.join((TESTS, *sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for flag in ("0", "1")
    ]
    assert said[0] == said[1] != ""
