"""Curves over the iterations of a run as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import pandas as pd

WIDTH, HEIGHT = 420, 170
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 8, 22
SMOOTHED_FROM = 20
_MOST_POINTS = 400


@dataclass(frozen=True)
class Curve:
    """Numbers over iterations. values: indexed by iteration; marks: further points of the same unit, such as those of
    evaluations, indexed by iterations done."""

    title: str
    values: pd.Series
    marks: pd.Series | None = None


def curve_html(curve: Curve) -> str:
    """A chart with its title and last value. From `SMOOTHED_FROM` points on a thin line, and its rolling mean."""
    values = curve.values.dropna()
    marks = pd.Series(dtype=float) if curve.marks is None else curve.marks.dropna()
    every = pd.concat([values, marks])
    if every.empty:
        return ""
    frame = _Frame.around(every)
    last = f"{(values if len(values) else marks).iloc[-1]:.4g}"
    drawn = [_axes(frame)]
    if len(values) >= SMOOTHED_FROM:
        drawn.append(_line(frame, values, "raw"))
        values = values.rolling(max(2, len(values) // 10), min_periods=1, center=True).mean()
    drawn += [_line(frame, values, ""), _line(frame, marks, "s1"), *_points(frame, marks)]
    return (
        f'<div><h3>{escape(curve.title)}: <span class="last">{last}</span></h3>'
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(curve.title)}">'
        f"{''.join(drawn)}</svg></div>"
    )


@dataclass(frozen=True, slots=True)
class _Frame:
    """The numbers at the edges of a chart."""

    left: float
    right: float
    low: float
    high: float

    @classmethod
    def around(cls, values: pd.Series) -> _Frame:
        low, high = float(values.min()), float(values.max())
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        left, right = float(values.index.min()), float(values.index.max())
        return cls(left, max(right, left + 1.0), low - room, high + room)

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (self.high - value) / (self.high - self.low)


def round_values(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values within [low, high], 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(frame: _Frame) -> str:
    parts = []
    for value in round_values(frame.low, frame.high):
        y = frame.y(value)
        parts.append(f'<line class="tick" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="axis" x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in round_values(frame.left, frame.right):
        if value == int(value):
            at = f'x="{frame.x(value):.1f}" y="{HEIGHT - 6}"'
            parts.append(f'<text class="axis" {at} text-anchor="middle">{value:g}</text>')
    return "".join(parts)


def _line(frame: _Frame, values: pd.Series, kind: str) -> str:
    if values.empty:
        return ""
    thinned = values.iloc[:: max(1, len(values) // _MOST_POINTS)]
    places = " L".join(f"{frame.x(at):.1f},{frame.y(value):.1f}" for at, value in _pairs(thinned))
    return f'<path class="{kind}" d="M{places}"/>'


def _points(frame: _Frame, marks: pd.Series) -> Sequence[str]:
    return [
        f'<circle cx="{frame.x(at):.1f}" cy="{frame.y(value):.1f}" r="3"><desc>{at:g}: {value:.4g}</desc></circle>'
        for at, value in _pairs(marks)
    ]


def _pairs(values: pd.Series) -> list[tuple[float, float]]:
    return list(zip(map(float, values.index), map(float, values), strict=True))
