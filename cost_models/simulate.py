"""Play a program on its ranks: which step runs when, the steady-state period, and the latency of one iteration.

A rank runs one step at a time, in program order. A call starts when its ranks are free and its inputs have
arrived; a reallocation holds the ranks of both layouts, unless every rank has its slices already; a transfer holds
nobody and delays only its consumer.
Iterations follow each other until every rank and every call moves on by the same amount per period (or per two): that
amount is the period (the max-plus eigenvalue of the program; Baccelli et al. 1992, Synchronization and Linearity,
ch. 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from plans.program import Program, Step, StepKind
from plans.timeline import Span, Timeline

WINDOW = 60  # periods; divisible by every short cycle, so that the growth over it is not too small
SHOWN_ITERATIONS = 3
_TIMED = (StepKind.REALLOCATE, StepKind.CALL, StepKind.FUNCTION)


@dataclass(frozen=True)
class Durations:
    """Seconds of every step of a program, by `Step.name`; steps that are not listed take no time."""

    seconds: Mapping[str, float]

    def of(self, step: Step) -> float:
        """Seconds of one step."""
        return self.seconds.get(step.name, 0.0)


@dataclass
class _State:
    """Clock of the simulation: when each rank is free, when each call of each iteration ended or its inputs arrive."""

    free: NDArray[np.float64]
    ends: dict[tuple[str, int], float] = field(default_factory=dict)
    arrivals: dict[tuple[str, int], float] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)


def simulate(program: Program, durations: Durations) -> Timeline:
    """Predicted timeline of the first iterations, with the steady-state period."""
    state = _State(np.zeros(program.plan.cluster.size))
    waits = _waits(program)
    snapshots = [_snapshot(program, state, 0)]
    depth = max((edge.distance for edge in program.plan.workload.graph.edges), default=1)
    for period in range(program.max_lag + 2 * WINDOW):
        for step in program.steps:
            if period >= step.lag:
                _play(state, step, period - step.lag, durations.of(step), waits)
        snapshots.append(_snapshot(program, state, period))
        cycle = _settled(snapshots[program.max_lag + 1 :], depth)
        if cycle and period >= program.max_lag + SHOWN_ITERATIONS:
            break
    cycle = cycle or WINDOW
    growth = (snapshots[-1] - snapshots[-1 - cycle]) / cycle
    spans = tuple(span for span in state.spans if span.iteration < SHOWN_ITERATIONS)
    return Timeline(source="predicted", period_s=float(growth.max()), spans=spans)


def _settled(snapshots: list[NDArray[np.float64]], depth: int) -> int:
    """1 or 2 when everything moved on by the same amount over that many last periods, else 0; and so in each of the
    last `depth` periods, since a call may wait for what happened so many periods before."""
    for cycle in (1, 2):
        if len(snapshots) > cycle + depth - 1:
            last = np.array(snapshots[-cycle - depth :])
            growth = last[cycle:] - last[:-cycle]
            if np.ptp(growth) <= 1e-9 * max(1.0, float(growth.max())):
                return cycle
    return 0


def latency_s(program: Program, durations: Durations) -> float:
    """Seconds from the start to the end of one iteration that runs alone."""
    state = _State(np.zeros(program.plan.cluster.size))
    waits = _waits(program)
    for step, iteration in program.unrolled(1):
        _play(state, step, iteration, durations.of(step), waits)
    return float(state.free.max())


def _waits(program: Program) -> dict[str, list[tuple[str, int]]]:
    """Call -> the (call, distance) pairs that it waits for."""
    waits: dict[str, list[tuple[str, int]]] = {}
    for edge in program.plan.workload.graph.edges:
        waits.setdefault(edge.target, []).append((edge.source, edge.distance))
    return waits


def _snapshot(program: Program, state: _State, period: int) -> NDArray[np.float64]:
    """Everything that the next period depends on; ranks that no call uses are left out."""
    used = sorted({rank for planned in program.plan.calls for rank in program.plan.ranks(planned.call)})
    ends = [
        state.ends.get((call.name, period - lag), 0.0)
        for call in program.plan.workload.graph.calls
        for lag in [program.plan.planned(program.plan.workload.graph.host(call.name)).lag]
    ]
    return np.array([*state.free[used], *ends])


def _play(
    state: _State, step: Step, iteration: int, seconds: float, waits: Mapping[str, list[tuple[str, int]]]
) -> None:
    ranks = list(step.ranks)
    if step.kind is StepKind.TRANSFER:
        start = state.ends[(step.subject, iteration)]
        key = (step.consumer, iteration)
        state.arrivals[key] = max(state.arrivals.get(key, 0.0), start + seconds)
        if seconds:
            state.spans.append(_span(step, iteration, start, start + seconds))
        return
    if step.kind not in _TIMED or (step.kind is StepKind.REALLOCATE and not seconds):
        return
    start = float(state.free[ranks].max())
    if step.kind is StepKind.REALLOCATE:
        start = max(start, *(state.ends.get((source, iteration - d), 0.0) for source, d in waits[step.subject] if d))
    else:
        start = max(start, state.arrivals.get((step.subject, iteration), 0.0))
        ready = (state.ends.get((source, iteration - d), 0.0) for source, d in waits.get(step.subject, []))
        start = max(start, *ready, 0.0)
        state.ends[(step.subject, iteration)] = start + seconds
    state.free[ranks] = start + seconds
    state.spans.append(_span(step, iteration, start, start + seconds))


def _span(step: Step, iteration: int, start_s: float, end_s: float) -> Span:
    return Span(
        name=step.name, kind=step.kind.value, iteration=iteration, start_s=start_s, end_s=end_s, ranks=step.ranks
    )
