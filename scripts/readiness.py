"""Another objective for `planner.search.mcmc`: the makespan of five iterations played in order of readiness.

The fixed tables of a benchmark are judged by it: no order and no lag is decided, a ready call starts at once.
"""

from __future__ import annotations

import numpy as np

from planner.search import schedule
from planner.search.arrays import Scratch, Tables
from planner.search.compiled import compiled
from planner.search.kernels import (
    BEST,
    COVER,
    DISTANCE,
    EDGES,
    EDGES_END,
    LATENCY,
    MEMBER,
    MEMORY_PENALTY,
    OVERFLOW,
    PERIOD,
    PRESENT,
    SOURCE,
    TRAINER,
    WAITS,
    accepts,
    choose_anew,
    copy_decision,
    draw,
    is_legal,
    list_nodes,
    memory_overflow,
    move_seconds,
)
from planner.search.problem import Decision, FloatArray, IntArray

ITERATIONS = 5


@compiled
def ready_time(t: Tables, s: Scratch, c: int, done: IntArray) -> float:
    """When the next iteration of call c is ready, infinite while it waits for a call that has not run."""
    ready = 0.0
    for e in range(t.call[c, EDGES], t.call[c, EDGES_END]):
        u, j = t.edge[e, SOURCE], done[c] - t.edge[e, DISTANCE]
        if j >= 0:
            if done[u] <= j:
                return np.inf
            ready = max(ready, s.ends[j, u])
    return ready


@compiled
def makespan_of(t: Tables, x: IntArray, s: Scratch) -> float:
    """Seconds of ITERATIONS iterations when ready calls start in order of readiness, ties in graph order.

    A move and its call are one step here. WAITS counts finished iterations; row i of `ends` holds those of iteration i,
    row ITERATIONS the last end of each node, the row after it when a call is ready.
    """
    n, last, makespan = x.shape[1], ITERATIONS, 0.0
    list_nodes(t, x, s)
    done, ready = s.node[WAITS], s.ends[ITERATIONS + 1]
    for c in range(n):
        done[c], ready[c] = 0, np.inf
        s.ends[last, c], s.ends[last, n + c] = 0.0, 0.0
    for _ in range(n * ITERATIONS):
        c, start = -1, np.inf
        for candidate in range(n):
            if done[candidate] < ITERATIONS:
                if ready[candidate] == np.inf:
                    ready[candidate] = ready_time(t, s, candidate, done)
                if ready[candidate] < start:
                    c, start = candidate, ready[candidate]
        ready[c] = np.inf
        moved = move_seconds(t, x, c)
        u = t.call[c, TRAINER] if moved > 0.0 else c
        meets, holds = s.node[COVER, c] | s.node[COVER, u], s.node[MEMBER, c] | s.node[MEMBER, u]
        for b in range(n):
            if meets & (1 << b):
                start = max(start, s.ends[last, b])
            if s.ends[last, n + b] > start and s.node[COVER, t.call[b, TRAINER]] & holds:
                start = s.ends[last, n + b]
        if moved > 0.0:
            s.ends[last, n + c] = start + moved
        s.ends[last, c] = start + moved + s.duration[c]
        s.ends[done[c], c] = s.ends[last, c]
        done[c] += 1
        makespan = max(makespan, s.ends[last, c])
    return makespan


@compiled
def measure(t: Tables, x: IntArray, s: Scratch, costs: FloatArray) -> float:
    """The makespan, raised by memory above capacity; fills PERIOD (with the makespan), LATENCY and OVERFLOW."""
    costs[OVERFLOW], costs[PERIOD], costs[LATENCY] = memory_overflow(t, x), makespan_of(t, x, s), 0.0
    return costs[PERIOD] * (1.0 + MEMORY_PENALTY * costs[OVERFLOW] / t.capacity)


@compiled
def metropolis(
    t: Tables, s: Scratch, now: IntArray, best: IntArray, random: IntArray, costs: FloatArray,
    temperature_s: float, steps: int,
) -> None:  # fmt: skip
    """As `planner.search.kernels.metropolis`, over choices alone."""
    for step in range(-1 if np.isnan(costs[PRESENT]) else 0, steps):
        copy_decision(now, s.tried)
        if step >= 0:
            c, other = draw(random, now.shape[1]), draw(random, now.shape[1])
            choose_anew(t, random, s.tried, c, other, draw(random, 75))
        if not is_legal(t, s.tried, s):
            continue
        cost = measure(t, s.tried, s, costs)
        if step < 0 or accepts(random, cost - costs[PRESENT], temperature_s):
            costs[PRESENT] = cost
            copy_decision(s.tried, now)
            if costs[OVERFLOW] == 0.0 and cost < costs[BEST]:
                costs[BEST] = cost
                copy_decision(s.tried, best)


def makespan_s(t: Tables, choice: tuple[int, ...]) -> float:
    """Seconds of five iterations in which ready calls start in order of readiness."""
    x, costs = schedule.rows(Decision(choice, tuple(range(len(choice))), (0,) * len(choice))), np.full(5, np.nan)
    metropolis(t, schedule.scratch(t), x, x.copy(), np.ones(4, np.int64), costs, 1.0, 0)
    return float(costs[PERIOD])
