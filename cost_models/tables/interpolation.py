"""Multilinear interpolation in log space on a full grid, vectorised, that says how far each answer reaches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from cost_models.candidates import Array


class Source(IntEnum):
    """Where a number comes from, best first."""

    MEASURED = 0
    INTERPOLATED = 1
    ANALYTIC = 2


@dataclass(frozen=True, eq=False)
class Answer:
    """Values with their source and how far they lie outside the grid, arrays of one shape.

    beyond: product over axes of the ratio to the nearest edge of the grid; 1 inside.
    """

    value: Array
    source: NDArray[np.int8]
    beyond: Array

    def shares(self) -> dict[str, float]:
        """Share of the values per source, as a plan's provenance states it."""
        return {kind.name.lower(): float(np.mean(self.source == kind)) for kind in Source}


@dataclass(frozen=True, eq=False)
class Grid:
    """Values on a full grid.

    axes: name -> ascending positive points. exact: axes that are looked up, never interpolated (tp, ranks).
    grows: beyond the upper edge the last slope goes on (times, bytes); otherwise the edge holds (efficiencies). Below
    the lower edge the edge always holds: launches and latencies have a floor.
    """

    axes: Mapping[str, Array]
    values: Array
    exact: frozenset[str] = frozenset()
    grows: bool = True

    def answer(self, points: Mapping[str, Array | float], fallback: Array | float = np.nan) -> Answer:
        """Values at points (broadcast together); `fallback`, marked analytic, where an exact axis has no such point."""
        coordinates = np.broadcast_arrays(*(np.asarray(points[name], dtype=np.float64) for name in self.axes))
        places = [
            self._exact(axis, x) if name in self.exact else self._between(axis, x)
            for (name, axis), x in zip(self.axes.items(), coordinates, strict=True)
        ]
        hit = np.logical_and.reduce([place.hit for place in places])
        on_grid = np.logical_and.reduce([place.on_grid for place in places])
        beyond = np.multiply.reduce([place.beyond for place in places])
        value = np.exp(self._blend(places))
        source = np.where(on_grid, Source.MEASURED, Source.INTERPOLATED)
        return Answer(
            value=np.where(hit, value, fallback),
            source=np.where(hit, source, Source.ANALYTIC).astype(np.int8),
            beyond=np.where(hit, beyond, 1.0),
        )

    def _blend(self, places: Sequence[_Place]) -> Array:
        """Log of the value: the corners of each cell, weighted."""
        logs = np.log(self.values)
        total = np.zeros_like(places[0].weight)
        sides = [((p.low, 1.0 - p.weight), (p.high, p.weight)) for p in places]
        for corner in itertools.product(*sides):
            total += math.prod(weight for _, weight in corner) * logs[tuple(index for index, _ in corner)]
        return total

    def _exact(self, axis: Array, x: Array) -> _Place:
        low = np.minimum(np.searchsorted(axis, x), len(axis) - 1)
        hit = axis[low] == x
        return _Place(low=low, high=low, weight=np.zeros_like(x), hit=hit, on_grid=hit, beyond=np.ones_like(x))

    def _between(self, axis: Array, x: Array) -> _Place:
        assert (x > 0).all(), "a log axis has positive points only"
        last = len(axis) - 1
        low = np.minimum(np.maximum(np.searchsorted(axis, x, side="right") - 1, 0), max(last - 1, 0))
        high = np.minimum(low + 1, last)
        below, above = axis[low], axis[high]
        span = np.log(above / below)
        weight = np.maximum(np.divide(np.log(x / below), span, out=np.zeros_like(x), where=span > 0), 0.0)
        return _Place(
            low=low,
            high=high,
            weight=weight if self.grows else np.minimum(weight, 1.0),
            hit=np.ones_like(x, dtype=np.bool_),
            on_grid=(x == below) | (x == above),
            beyond=np.maximum(1.0, np.maximum(x / axis[-1], axis[0] / x)),
        )


@dataclass(frozen=True, eq=False)
class _Place:
    """Where points lie on one axis: cell, weight of its upper corner, whether the axis covers them."""

    low: NDArray[np.intp]
    high: NDArray[np.intp]
    weight: Array
    hit: NDArray[np.bool_]
    on_grid: NDArray[np.bool_]
    beyond: Array
