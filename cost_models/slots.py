"""Slots that refill: how many sequences decode at which step, and how long they are by then.

A slot is a renewal process: a response ends and the next one of the queue begins, until the queue is empty; then the
slots run dry. What is expected of one slot (starts by time t, responses alive and their age a time x after the queue
ran empty) depends on the lengths alone (Feller 1968, chapter XIII), so that it is tabulated once for all layouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.candidates import Array, Candidates
from plans.lengths import Lengths

_NODES_FORCED, _NODES_TAILED, _NODES_MEASURED = 2, 8, 16
_CELLS = 128
"""Parts that the longest response is cut into; the queue is followed exactly for `_SPANS` times the longest."""
_SPANS = 8


@dataclass(frozen=True, eq=False)
class DecodeMoment:
    """Decode steps that are costed as one. Arrays [candidates]: `weight` steps; `alive` share of the `slots` of a
    replica that have a sequence; `position` tokens that these have generated, on the average."""

    weight: Array
    alive: Array
    position: Array
    slots: Array

    def running(self, replicas: Array) -> Array:
        """Chance that some sequence of all replicas still runs."""
        if (self.alive >= 1.0).all():
            return np.ones_like(self.alive)
        return 1.0 - (1.0 - np.minimum(self.alive, 1.0)) ** np.maximum(self.slots * replicas, 1.0)


def slots_of(candidates: Candidates, samples: float) -> Array:
    """Slots of a replica: what the strategy says, or what one of its waves has (`plans.kvcache.slots_per_replica`)."""
    c, rows = candidates, samples / candidates.dp
    parts = np.where(c.waves > 1, np.ceil(rows / c.waves), rows)
    return np.minimum(rows, np.where(c.slots > 0, c.slots, parts))


@lru_cache(maxsize=64)
def quadrature(responses: Lengths, steps: float) -> tuple[Array, Array]:
    """Gauss-Legendre points on the decode steps of the longest response, and their weights."""
    nodes, weights = np.polynomial.legendre.leggauss(
        _NODES_FORCED if responses.full else _NODES_MEASURED if responses.percentiles else _NODES_TAILED
    )
    return 0.5 * steps * (nodes + 1.0), 0.5 * steps * weights


def decode_moments(
    responses: Lengths, rows: Array, slots: Array, *, first: float, burst: float
) -> Iterator[DecodeMoment]:
    """Decode steps of a replica that has `rows` responses to make in `slots` slots, arrays [candidates].

    first: tokens of a response that prefill makes (1 or 0). burst: steps between two looks at which responses have
    ended, so that one occupies its slot for (burst - 1) / 2 steps more; where all end together there is nothing to wait
    for.
    """
    steps = max(responses.longest - first, 0.0)
    if responses.full:
        yield from _waves(responses, rows, slots, steps, first)
        return
    wait = 0.5 * (burst - 1.0)
    table = _refill(responses, steps, wait)
    shares = rows / slots
    queue_s, busy = table.queue(shares)
    if (queue_s > 0).any():
        yield DecodeMoment(queue_s, np.ones_like(rows), busy + first, slots)
    for node, weight in enumerate(table.weights):
        alive, position = table.tail(shares, node)
        yield DecodeMoment(np.full_like(rows, weight), alive, position + first, slots)


def _waves(responses: Lengths, rows: Array, slots: Array, steps: float, first: float) -> Iterator[DecodeMoment]:
    """Equal responses: slots are refilled all at once, and what is left over has slots to spare."""
    whole = np.floor(rows / slots + 1e-9)
    left = np.maximum(rows - whole * slots, 0.0)
    for position, weight in zip(*quadrature(responses, steps), strict=True):
        at = np.full_like(rows, position + first)
        yield DecodeMoment(weight * whole, np.ones_like(rows), at, slots)
        if (left > 1e-9).any():
            yield DecodeMoment(np.where(left > 1e-9, weight, 0.0), np.ones_like(rows), at, np.maximum(left, 1e-9))


@dataclass(frozen=True, eq=False)
class _Refill:
    """What one slot is expected to do. times: steps since its start [K]. starts: responses begun by then. busy: mean
    age up to then of what it decodes. alive, age: [nodes, K] of what is left in it `nodes` steps after a queue that ran
    empty at that time; age is the sum over what is alive. mean: steps of a response."""

    times: Array
    starts: Array
    busy: Array
    alive: Array
    age: Array
    weights: Array
    mean: float

    def queue(self, shares: Array) -> tuple[Array, Array]:
        """Steps until a queue of `shares` responses per slot is empty, and the mean age of responses up to then."""
        end, most = self.times[-1], self.starts[-1]
        steps = np.where(shares > most, end + (shares - most) * self.mean, np.interp(shares, self.starts, self.times))
        steps = np.where(shares <= 1.0, 0.0, steps)
        busy = np.interp(steps, self.times, self.busy)
        late = np.maximum(steps - end, 0.0)  # beyond the table the age stays what it is on the average
        return steps, (busy * (steps - late) + self.busy[-1] * late) / np.maximum(steps, 1e-9)

    def tail(self, shares: Array, node: int) -> tuple[Array, Array]:
        """Responses alive per slot, and their mean age, at a node of the tail."""
        at = np.minimum(self.queue(shares)[0], self.times[-1])
        alive = np.interp(at, self.times, self.alive[node])
        age = np.interp(at, self.times, self.age[node])
        return alive, age / np.maximum(alive, 1e-12)


def _renewals(chance: Array) -> Array:
    """Rows that begin in each cell of a slot's time; chance: of each length in cells, which adds up to one."""
    begun = np.zeros(_SPANS * _CELLS)
    for k in range(len(begun)):
        reach = min(k, _CELLS)
        before = float(chance[1 : reach + 1] @ begun[k - reach : k][::-1]) if reach else 0.0
        begun[k] = ((k == 0) + before) / (1.0 - chance[0])
    return begun


@lru_cache(maxsize=64)
def _refill(responses: Lengths, steps: float, wait: float) -> _Refill:
    """The table. Chances of a length are those of a grid that keeps the mean; a renewal of the k-th cell starts in its
    middle."""
    cell = steps / _CELLS

    def survival(t: NDArray[Any]) -> Array:
        flat = [responses.beyond(max(x - wait, 0.0)) if x < steps else 0.0 for x in t.ravel().tolist()]
        return np.array(flat).reshape(t.shape)

    grid = survival(np.arange(_CELLS + 1) * cell)
    grid[-1] = responses.beyond(max(steps - wait - 1e-9, 0.0))  # the last step before all must have ended
    fine = np.concatenate([[0.0], np.cumsum(0.5 * (grid[1:] + grid[:-1]))]) * cell
    slope = np.concatenate([[1.0], np.diff(fine) / cell, [0.0]])
    chance = np.maximum(-np.diff(slope), 0.0)
    begun, count = _renewals(chance / chance.sum()), _SPANS * _CELLS
    nodes, weights = quadrature(responses, steps)
    ages = (np.arange(_CELLS + 1) + 0.5) * cell
    alive, age = [], []
    for node in nodes:
        held = survival(ages + node)
        alive.append(np.concatenate([survival(np.array([node])), np.convolve(begun, held)[:count]]))
        older = held * (ages + node)
        age.append(np.concatenate([survival(np.array([node])) * node, np.convolve(begun, older)[:count]]))
    held = survival(ages)
    now = np.convolve(begun, held * ages)[:count] / np.maximum(np.convolve(begun, held)[:count], 1e-12)
    times = np.concatenate([[0.0], (np.arange(count) + 0.5) * cell])
    busy = np.concatenate([[0.0], (np.cumsum(now) - 0.5 * now) / (np.arange(count) + 0.5)])
    return _Refill(
        times=times,
        starts=np.concatenate([[1.0], np.maximum.accumulate(np.maximum(np.cumsum(begun), 1.0))]),
        busy=busy,
        alive=np.array(alive),
        age=np.array(age),
        weights=weights,
        mean=float(fine[-1]),
    )
