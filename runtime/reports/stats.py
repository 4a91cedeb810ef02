"""Statistics that ranks report in parts and that merge exactly: mean, maximum, minimum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the launcher reads statistics and does without torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Stat:
    """Sum, count and extremes of some numbers."""

    total: float
    count: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Stat | None:
        """Of all elements; None of an empty tensor."""
        if not values.numel():
            return None
        exact = values.double()
        return cls(float(exact.sum()), exact.numel(), float(exact.min()), float(exact.max()))

    @classmethod
    def one(cls, value: float) -> Stat:
        """Of one number."""
        return cls(value, 1.0, value, value)

    @property
    def mean(self) -> float:
        """The mean."""
        return self.total / self.count


def merge_stats(parts: Iterable[Stat]) -> Stat:
    """The statistic of everything that the parts are of."""
    found = list(parts)
    return Stat(
        sum(s.total for s in found),
        sum(s.count for s in found),
        min(s.low for s in found),
        max(s.high for s in found),
    )
