"""Metropolis-Hastings over decisions: several chains on a ladder of temperatures that exchange their places.

A fixed number of evaluations gives the same answer in every process; a limit in seconds only cuts that short.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from planner.search import beginnings, kernels, schedule
from planner.search.arrays import Scratch, Tables
from planner.search.problem import Decision, FloatArray, IntArray, Options, SearchProblem
from plans.errors import Infeasible

CHAINS = 24
STEPS_PER_ROUND = 256
LEAST_EVALUATIONS = 50_000  # before a search that found nothing gives up, whatever the clock says
COLDEST, HOTTEST = 5e-4, 3e-2  # temperatures as parts of the best cost
UNLIMITED = 1 << 60

Loop = Callable[[Tables, Scratch, IntArray, IntArray, IntArray, FloatArray, float, int], None]
"""Steps of one chain: `kernels.metropolis`, or another one of its signature, which minimises something else."""


@dataclass(frozen=True, eq=False)
class Chains:
    """The state of a search, enough to go on: now and best [chains, 3, n] (choice, order, lag), random [chains, 4],
    costs [chains, 5] as in `kernels.metropolis`."""

    now: IntArray
    best: IntArray
    random: IntArray
    costs: FloatArray
    exchange: IntArray
    evaluated: int = 0

    def copy(self) -> Chains:
        """An independent copy."""
        arrays = {name: getattr(self, name).copy() for name in ("now", "best", "random", "costs", "exchange")}
        return Chains(**arrays, evaluated=self.evaluated)


@dataclass(frozen=True)
class Walked:
    """The best decision so far. `objective_s` is what was minimised; `chains` resumes the search."""

    decision: Decision
    period_s: float
    latency_s: float
    objective_s: float
    evaluated: int
    seconds: float
    chains: Chains


def _seeded(seed: int, count: int) -> IntArray:
    words = np.random.SeedSequence(seed).generate_state(4 * count, np.uint32).astype(np.int64).reshape(count, 4)
    words[:, 0] |= 1  # a generator must not start at all zeros
    return words


def _start(problem: SearchProblem, seed: int, first: Decision, count: int) -> Chains:
    """Chains at `first`; every second one somewhere random."""
    random = _seeded(seed, count + 1)
    assert schedule.is_legal(problem, first), "the start is not a legal decision"
    now = np.tile(schedule.rows(first), (count, 1, 1))
    for k in range(1, count, 2):
        now[k, 0] = beginnings.anywhere(problem, lambda bound, row=random[k]: kernels.draw(row, bound))  # type: ignore[misc]
    costs = np.full((count, 5), np.nan)
    costs[:, kernels.BEST] = np.inf
    return Chains(now, now.copy(), random[:count], costs, random[count])


def _exchange(chains: Chains, temperatures: FloatArray) -> None:
    """Neighbours on the ladder swap places with the Metropolis probability of parallel tempering."""
    for k in range(len(temperatures) - 1):
        gain = (chains.costs[k, kernels.PRESENT] - chains.costs[k + 1, kernels.PRESENT]) * (
            1 / temperatures[k] - 1 / temperatures[k + 1]
        )
        if gain >= 0 or kernels.draw(chains.exchange, 1 << 30) < np.exp(gain) * (1 << 30):
            chains.now[[k, k + 1]] = chains.now[[k + 1, k]]
            chains.costs[[k, k + 1], kernels.PRESENT] = chains.costs[[k + 1, k], kernels.PRESENT]


def rounds(
    problem: SearchProblem, chains: Chains, t: Tables, evaluations: int, workers: int, loop: Loop
) -> Iterator[Chains]:
    """Go on until `evaluations` more are done; yields the state after every round."""
    chains, count = chains.copy(), len(chains.costs)
    scratches = [schedule.scratch(t) for _ in range(count)]
    ladder = np.geomspace(COLDEST, HOTTEST, count)
    left, scale = evaluations, float(sum(options.time_s.min() for options in problem.options))
    with ThreadPoolExecutor(workers) as pool:
        while left > 0:
            temperatures = ladder * min(chains.costs[:, kernels.BEST].min(), scale)
            steps = [min(STEPS_PER_ROUND, max(0, left - k * STEPS_PER_ROUND)) for k in range(count)]
            arguments = zip(
                [t] * count, scratches, chains.now, chains.best, chains.random, chains.costs, temperatures, steps,
                strict=True,
            )  # fmt: skip
            list(pool.map(lambda a: loop(*a), arguments))
            left -= sum(steps)
            _exchange(chains, temperatures)
            chains = replace(chains, evaluated=chains.evaluated + sum(steps))
            yield chains


def _found(t: Tables, chains: Chains, seconds: float) -> Walked | None:
    k = int(chains.costs[:, kernels.BEST].argmin())
    if not np.isfinite(chains.costs[k, kernels.BEST]):
        return None
    decision = Decision(*(tuple(map(int, row)) for row in chains.best[k]))
    cost = schedule.evaluate(t, decision)
    objective = float(chains.costs[k, kernels.BEST])
    return Walked(decision, cost.period_s, cost.latency_s, objective, chains.evaluated, seconds, chains.copy())


def least_bytes(options: Options) -> float:
    """What a call needs on each of its GPUs at least."""
    return float((options.resident_bytes + options.transient_bytes - options.shared_bytes).min())


def overfull(problem: SearchProblem, evaluated: int) -> Infeasible:
    """Why nothing fits, as far as the options tell; `evaluated` is zero where it is proved."""
    capacity = problem.capacity_bytes / 2**30
    for name, options in zip(problem.names, problem.options, strict=True):
        least = least_bytes(options) / 2**30
        if least > capacity:
            reason = f"`{name}` needs at least {least:.1f} GiB on a GPU of {capacity:.1f} GiB"
            return Infeasible(reason, "use more GPUs, a GPU with more memory, or options that need less")
    if beginnings.fastest(problem) is None:
        return apart(problem)
    how = f"none was found in {evaluated:,} evaluations" if evaluated else "this is proved"
    reason = f"there is no plan within {capacity:.1f} GiB per GPU: each call fits alone, but not all together ({how})"
    return Infeasible(reason, "use more GPUs, or a GPU with more memory")


def apart(problem: SearchProblem) -> Infeasible:
    """Calls that must share a mesh have none in common."""
    groups = "; ".join(", ".join(f"`{problem.names[c]}`" for c in group) for group in problem.same_mesh)
    return Infeasible(
        f"no mesh suits all calls that must share one ({groups})", "drop a --same-mesh, --pin or --forbid"
    )


def search(
    problem: SearchProblem,
    *,
    seed: int = 0,
    seconds: float = np.inf,
    evaluations: int = UNLIMITED,
    start: Decision | None = None,
    resume: Chains | None = None,
    loop: Loop = kernels.metropolis,
    workers: int = 1,
    tables: Tables | None = None,
    progress: Callable[[Walked], None] | None = None,
) -> Walked | Infeasible:
    """The best decision within `seconds` and `evaluations` (at least one of them finite), never worse than `start`.

    Goes on from `resume` where given. `progress` hears of every improvement. Infeasible: nothing seen fits. The clock
    starts once the inner loop is compiled, and as long as nothing fits the seconds are no limit until
    `LEAST_EVALUATIONS` are done. tables: those of the problem, where they are at hand.
    """
    assert np.isfinite(seconds) or evaluations < UNLIMITED, "a search needs a limit"
    first = start or beginnings.fastest(problem)
    if first is None:
        return apart(problem)
    t = tables or schedule.tables(problem)
    schedule.compile_kernels()
    began = time.monotonic()
    chains = resume or _start(problem, seed, first, CHAINS)
    told = np.inf
    for state in rounds(problem, chains, t, evaluations, workers, loop):
        chains, spent = state, time.monotonic() - began
        if progress and chains.costs[:, kernels.BEST].min() < told:
            told = chains.costs[:, kernels.BEST].min()
            found = _found(t, chains, spent)
            if found:
                progress(found)
        fits = bool(np.isfinite(chains.costs[:, kernels.BEST]).any())
        if spent >= seconds and (fits or chains.evaluated >= LEAST_EVALUATIONS):
            break
    return _found(t, chains, time.monotonic() - began) or overfull(problem, chains.evaluated)
