"""Lengths: the distribution of prompt or response lengths, one object that costs, simulation, search and runtime read.

Three kinds: every length at the maximum; a mean, which stands for responses with a stop token of constant hazard
(exponential, cut at the maximum); or measured percentiles, linear in between.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from plans.errors import SpecError

MOST_PERCENTILES = 33
LEVELS = (*range(0, 91, 5), 92, 94, 95, 96, 97, 98, 98.5, 99, 99.3, 99.5, 99.7, 99.8, 99.9, 100)
"""Percentiles that a measured distribution is kept as: dense where long tails bend."""
ALMOST_ALL = 0.98
"""A mean above this share of the maximum means that every length reaches it."""
_PERCENTILE = re.compile(r"p(\d{1,3}(?:\.\d{1,4})?)")

Percentiles = tuple[tuple[float, int], ...]
"""(percent from 0 to 100, tokens), both ascending."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens.

    longest: the maximum. mean_tokens: the mean of the long-tailed family, 0 where it is not meant. percentiles: of
    measured lengths, empty where there are none; beyond the first and the last the distribution is flat.
    """

    longest: int
    mean_tokens: float = 0.0
    percentiles: Percentiles = ()

    def __post_init__(self) -> None:
        if not 0 <= self.mean_tokens <= self.longest:
            raise SpecError(
                f"a mean length of {self.mean_tokens:g} tokens is above the longest, {self.longest}",
                f"a mean of {self.longest} or less, or a larger maximum",
            )
        if self.percentiles and self.mean_tokens:
            raise SpecError("a mean length and percentiles of lengths are given", "leave one of them out")
        if len(self.percentiles) > MOST_PERCENTILES:
            raise SpecError(
                f"{len(self.percentiles)} percentiles of lengths; it can be at most {MOST_PERCENTILES}", "fewer"
            )
        for percent, tokens in self.percentiles:
            if not 0 <= percent <= 100 or not 0 <= tokens <= self.longest:
                raise SpecError(
                    f"percentile {percent:g} of the lengths is {tokens} tokens; the longest has {self.longest}",
                    "percentiles from 0 to 100, with lengths up to the maximum",
                )
        for (a, x), (b, y) in pairwise(self.percentiles):
            if b <= a or y < x:
                raise SpecError(
                    f"percentiles of lengths must ascend: {x} tokens at {a:g} %, {y} tokens at {b:g} %",
                    "sort them",
                )

    @classmethod
    def measured(cls, values: Sequence[int], longest: int) -> Lengths:
        """The distribution of measured lengths, kept as `LEVELS`; raises SpecError for one beyond `longest`."""
        if not values:
            raise SpecError("there are no lengths to take a distribution from")
        ordered = sorted(values)
        if ordered[-1] > longest or ordered[0] < 0:
            wrong = ordered[-1] if ordered[-1] > longest else ordered[0]
            raise SpecError(
                f"a length of {wrong} tokens; lengths must be from 0 to the maximum, {longest}",
                f"a maximum of {max(ordered[-1], 1)} tokens",
            )
        percentiles = tuple((float(level), round(interpolated(ordered, level / 100))) for level in LEVELS)
        return cls(longest, percentiles=percentiles)

    @property
    def full(self) -> bool:
        """Whether every length is the maximum."""
        return not self.percentiles and not 0 < self.mean_tokens < ALMOST_ALL * self.longest

    @property
    def mean(self) -> float:
        """Mean length, tokens."""
        if self.full:
            return float(self.longest)
        if not self.percentiles:
            return self.mean_tokens
        first, last = self.percentiles[0], self.percentiles[-1]
        inner = sum((b - a) * (x + y) / 2 for (a, x), (b, y) in pairwise(self.percentiles))
        return (first[0] * first[1] + inner + (100 - last[0]) * last[1]) / 100

    @property
    def hazard(self) -> float:
        """Rate r of the long-tailed family, 1 / tokens: (1 - exp(-r longest)) / r = mean; 0 for the other kinds."""
        return 0.0 if self.full or self.percentiles else _hazard(self.mean_tokens, self.longest)

    def quantile(self, share: float) -> float:
        """Tokens that a `share` (0 to 1) of the lengths does not exceed."""
        if self.full:
            return float(self.longest)
        if not self.percentiles:
            rate = self.hazard
            return self.longest if share >= 1 else min(float(self.longest), -math.log1p(-share) / rate)
        percent, at = 100 * share, [p for p, _ in self.percentiles]
        upper = bisect_left(at, percent)
        if upper in (0, len(at)):
            return float(self.percentiles[min(upper, len(at) - 1)][1])
        (a, x), (b, y) = self.percentiles[upper - 1], self.percentiles[upper]
        return x + (y - x) * (percent - a) / (b - a)

    def beyond(self, tokens: float) -> float:
        """Share of the lengths that exceed `tokens`: how many sequences still run after so many steps."""
        if tokens >= self.longest:
            return 0.0
        if self.full:
            return 1.0
        if not self.percentiles:
            return math.exp(-self.hazard * max(tokens, 0.0))
        upper = bisect_right([y for _, y in self.percentiles], tokens)
        if upper in (0, len(self.percentiles)):
            return 1.0 if not upper else 0.0
        (a, x), (b, y) = self.percentiles[upper - 1], self.percentiles[upper]
        return 1 - (a + (b - a) * (tokens - x) / (y - x)) / 100

    def draw(self, count: int, seed: int = 0) -> tuple[int, ...]:
        """`count` lengths that stand for the distribution: the middles of `count` equal shares, in random order. At
        least 1 token each where the maximum is not 0."""
        least = min(1, self.longest)
        drawn = [max(least, round(self.quantile((i + 0.5) / count))) for i in range(count)]
        random.Random(seed).shuffle(drawn)
        return tuple(drawn)

    def with_mean(self, mean: float) -> Lengths:
        """The same shape with another mean: measured percentiles are scaled, and cut at the maximum."""
        if not self.percentiles:
            return Lengths(self.longest, mean)
        if not 0 < mean <= self.longest:
            return Lengths(self.longest, mean)  # raises with the rule, or means every length at the maximum
        low, high = 0.0, 100.0 * self.longest
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if self._scaled(middle).mean < mean else (low, middle)
        return self._scaled(high)

    def _scaled(self, factor: float) -> Lengths:
        return Lengths(self.longest, 0.0, tuple((p, min(self.longest, round(factor * t))) for p, t in self.percentiles))


def percentiles_of(keys: Mapping[str, int]) -> Percentiles:
    """Percentiles as a file writes them: `{"p50": 700, "p99": 6000}`."""
    found = []
    for key, tokens in keys.items():
        match = _PERCENTILE.fullmatch(key)
        if not match or float(match[1]) > 100:
            raise SpecError(f"`{key}` is not a percentile of lengths", "p0 to p100, such as p50 or p99.5")
        found.append((float(match[1]), tokens))
    return tuple(sorted(found))


def keys_of(percentiles: Percentiles) -> dict[str, int]:
    """Percentiles as a file writes them."""
    return {f"p{percent:g}": tokens for percent, tokens in percentiles}


def interpolated(ordered: Sequence[int], share: float) -> float:
    """What a `share` (0 to 1) of ascending numbers does not exceed, linear between two of them."""
    place = share * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 2) if len(ordered) > 1 else 0
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@lru_cache(maxsize=256)
def _hazard(mean: float, longest: float) -> float:
    """Rate r with (1 - exp(-r longest)) / r = mean, by bisection."""
    low, high = 1e-9 / longest, 50.0 / mean
    for _ in range(60):
        rate = 0.5 * (low + high)
        low, high = (rate, high) if -math.expm1(-rate * longest) / rate > mean else (low, rate)
    return 0.5 * (low + high)
