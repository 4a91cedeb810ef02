"""The critical path of a plan in steady state: the chain of steps whose lengths add up to the period, each with what
it waits for.

A step starts at the end of the latest thing that it waits for. Walked backwards from a late step of a long run, those
waits lead around the slowest circuit of the program, over and over; once around is the critical path (Baccelli et al.
1992, Synchronization and Linearity, ch. 3: the circuit of maximal mean). A circuit may take several iterations to
close; its lengths then add up to as many periods.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from cost_models.simulate import Durations
from plans.program import Program, Step, StepKind

HORIZON = 64  # periods played; more than the simulation needs to settle
TOLERANCE = 1e-9
_TIMED = (StepKind.REALLOCATE, StepKind.CALL, StepKind.FUNCTION)


class Wait(StrEnum):
    """Why a step does not start sooner: its inputs, its GPUs, or the weights that it reads."""

    GPUS = "gpus"
    WEIGHTS = "weights"
    DATA = "data"


_PREFERENCE = (Wait.GPUS, Wait.WEIGHTS, Wait.DATA)  # of things that end at the same moment the last is named


@dataclass(frozen=True, slots=True)
class Link:
    """A step on the critical path. start_s and iteration count from the path's first step; it starts when step
    `waits_for`, `earlier` iterations before, ends."""

    step: str
    kind: str
    call: str
    iteration: int
    start_s: float
    seconds: float
    wait: Wait
    waits_for: str
    earlier: int


@dataclass(frozen=True, slots=True)
class CriticalPath:
    """Once around the slowest circuit: the seconds of `links` add up to `periods` periods."""

    links: tuple[Link, ...]
    periods: int

    @property
    def seconds(self) -> float:
        """Length of the path."""
        return sum(link.seconds for link in self.links)

    @property
    def calls(self) -> tuple[str, ...]:
        """The calls on the path."""
        return tuple(dict.fromkeys(link.step for link in self.links if link.kind == StepKind.CALL))


@dataclass(frozen=True, slots=True)
class _Event:
    """One step of one iteration; `cause` is the event that it waited for, None where nothing held it."""

    step: Step
    iteration: int
    start_s: float
    end_s: float
    cause: _Event | None
    wait: Wait


@dataclass
class _Run:
    """Events so far, by what later ones wait for. free_s, holder: [ranks], the holder as a number of `events`."""

    free_s: NDArray[np.float64]
    holder: NDArray[np.int64]
    events: list[_Event] = field(default_factory=list)
    ended: dict[tuple[str, int], _Event] = field(default_factory=dict)
    arrivals: dict[tuple[str, int], list[_Event]] = field(default_factory=lambda: defaultdict(list))


def critical_path(program: Program, durations: Durations) -> CriticalPath:
    """The critical path of a program whose steps take `durations`."""
    run = _Run(np.zeros(program.plan.cluster.size), np.full(program.plan.cluster.size, -1))
    waits: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for edge in program.plan.workload.graph.edges:
        waits[edge.target].append((edge.source, edge.distance))
    ranks = {step: np.array(step.ranks) for step in program.steps}
    for step, iteration in program.unrolled(HORIZON):
        _play(run, step, iteration, durations.of(step), waits[step.subject], ranks[step])
    circuit, periods = _circuit(_backwards(max(run.events, key=lambda event: event.end_s)))
    return CriticalPath(_links(program, circuit, periods), periods)


def _play(
    run: _Run,
    step: Step,
    iteration: int,
    seconds: float,
    waits: Sequence[tuple[str, int]],
    ranks: NDArray[np.int64],
) -> None:
    if step.kind is StepKind.TRANSFER:
        source = run.ended[step.subject, iteration]
        event = _Event(step, iteration, source.end_s, source.end_s + seconds, source, Wait.DATA)
        run.arrivals[step.consumer, iteration].append(event)
        return
    if step.kind not in _TIMED:
        return
    causes = _causes(run, step, iteration, waits, ranks)
    cause, wait = max(causes, key=lambda c: (c[0].end_s, _PREFERENCE.index(c[1])), default=(None, Wait.GPUS))
    start = cause.end_s if cause else 0.0
    event = _Event(step, iteration, start, start + seconds, cause, wait)
    run.free_s[ranks], run.holder[ranks] = event.end_s, len(run.events)
    run.events.append(event)
    if step.kind is not StepKind.REALLOCATE:
        run.ended[step.subject, iteration] = event


def _causes(
    run: _Run, step: Step, iteration: int, waits: Sequence[tuple[str, int]], ranks: NDArray[np.int64]
) -> list[tuple[_Event, Wait]]:
    """Everything that must have ended before a step starts."""
    found: list[tuple[_Event, Wait]] = []
    for source, distance in waits:
        event = run.ended.get((source, iteration - distance))
        if event and (distance or step.kind is not StepKind.REALLOCATE):
            found.append((event, Wait.WEIGHTS if distance else Wait.DATA))
    if step.kind is not StepKind.REALLOCATE:
        found += [(event, Wait.DATA) for event in run.arrivals[step.subject, iteration]]
    holder = int(run.holder[ranks[run.free_s[ranks].argmax()]])
    if holder >= 0:
        event = run.events[holder]
        brought = event.step.kind is StepKind.REALLOCATE and event.step.copy == step.copy
        found.append((event, Wait.WEIGHTS if brought else Wait.GPUS))
    return found


def _backwards(last: _Event) -> list[_Event]:
    chain = [last]
    while chain[-1].cause:
        chain.append(chain[-1].cause)
    return chain


def _circuit(chain: Sequence[_Event]) -> tuple[list[_Event], int]:
    """Events of one turn in order of time, and the iterations it takes: of all returns of the backward `chain` to the
    same step the slowest per iteration; of equals the shortest, then the latest."""
    visits: dict[Step, list[int]] = defaultdict(list)
    for at, event in enumerate(chain):
        visits[event.step].append(at)
    turns = [pair for places in visits.values() for pair in combinations(places, 2)]
    assert turns, "a step of every iteration waits for the iteration before"

    def periods(turn: tuple[int, int]) -> int:
        return chain[turn[0]].iteration - chain[turn[1]].iteration

    def mean_s(turn: tuple[int, int]) -> float:
        return (chain[turn[0]].start_s - chain[turn[1]].start_s) / periods(turn)

    slowest = max(mean_s(turn) for turn in turns) * (1.0 - TOLERANCE)
    best = min((t for t in turns if mean_s(t) >= slowest), key=lambda t: (periods(t), t))
    return list(reversed(chain[best[0] : best[1]])), periods(best)


def _links(program: Program, circuit: Sequence[_Event], periods: int) -> tuple[Link, ...]:
    """The circuit as links, from the call that stands first in the graph; steps that take no time are left out."""
    first = _beginning(program, circuit)
    turned = [*circuit[first:], *circuit[:first]]
    links, at = [], 0.0
    for i, event in enumerate(turned):
        seconds = event.end_s - event.start_s
        iteration = event.iteration - turned[0].iteration + (periods if i >= len(turned) - first else 0)
        cause = event.cause
        assert cause is not None, "a circuit has no loose end"
        if seconds > 0:
            earlier = event.iteration - cause.iteration
            name, kind, call = event.step.name, event.step.kind.value, event.step.subject
            links.append(Link(name, kind, call, iteration, at, seconds, event.wait, cause.step.name, earlier))
        at += seconds
    return tuple(links)


def _beginning(program: Program, circuit: Sequence[_Event]) -> int:
    """Where to begin to read: the earliest call of the graph, with the reallocation that serves it."""
    order = [call.name for call in program.plan.workload.graph.calls]
    calls = [i for i, event in enumerate(circuit) if event.step.kind is not StepKind.TRANSFER]
    return min(calls, key=lambda i: (order.index(circuit[i].step.subject), circuit[i].step.kind is StepKind.CALL))
