"""Terms: what a call's time consists of, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from cost_models.candidates import Array


class Terms(Mapping[str, Array]):
    """An ordered mapping term -> seconds, shape [candidates] each. Terms add up to the call's time."""

    def __init__(self, seconds: Mapping[str, Array]) -> None:
        self._seconds = dict(seconds)

    def __getitem__(self, name: str) -> Array:
        return self._seconds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._seconds)

    def __len__(self) -> int:
        return len(self._seconds)

    @property
    def total_s(self) -> Array:
        """Seconds of the call, shape [candidates]."""
        total = np.zeros_like(next(iter(self._seconds.values())))
        for seconds in self._seconds.values():
            total = total + seconds
        return total
