"""Distinct combinations of values: costs that few shapes share are computed once for each of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cost_models.candidates import Array, Flags

_MIXER = np.uint64(0x9E3779B97F4A7C15)


def distinct(*columns: Array | Flags) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(first, inverse) of the distinct combinations of equally long columns: where each stands first, and which one
    every element has, so that `column == column[first][inverse]`.

    Combinations are told apart by a 64-bit hash of their bits: among a million, two share one with a chance of 3e-8.
    """
    hashes = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        bits = np.ascontiguousarray(column, dtype=np.float64).view(np.uint64)
        hashes = (hashes ^ bits) * _MIXER
        hashes ^= hashes >> np.uint64(29)
    order = np.argsort(hashes)
    ordered = hashes[order]
    starts = np.ones(len(order), dtype=np.bool_)
    starts[1:] = ordered[1:] != ordered[:-1]
    inverse = np.empty(len(order), dtype=np.intp)
    inverse[order] = np.cumsum(starts) - 1
    return order[starts], inverse


def on_distinct(function: Callable[..., Array], *columns: Array) -> Array:
    """function(*columns), element by element, evaluated once per distinct combination of equally long columns."""
    first, inverse = distinct(*columns)
    return function(*(column[first] for column in columns))[inverse]
