"""Says when a run takes other times than its plan predicts, and which calls do."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median

from plans.plan import ExecutionPlan

WINDOW = 5
"""Iterations whose medians are compared; the first one of a run, which warms up, is none of them."""
TOLERANCE = 1.3
"""Ratio of measured to predicted seconds, or its inverse, from which it is told."""


class Drift:
    """Compares the last iterations with the plan's estimate."""

    def __init__(self, plan: ExecutionPlan) -> None:
        self._predicted: dict[str, tuple[str, float]] = {}
        if plan.estimate is not None:
            calls = {name: (f"plan/{name}/measured_s", seconds) for name, seconds in plan.estimate.calls_s.items()}
            self._predicted = {"iteration": ("timing_s/step", plan.estimate.iteration_s), **calls}
        self._last: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        self._told = self._warm = False

    def add(self, metrics: Mapping[str, float]) -> str:
        """Take the metrics of an iteration; what to say, once in a run, empty otherwise."""
        if not self._warm:
            self._warm = True
            return ""
        self._last.append(metrics)
        if self._told or len(self._last) < WINDOW:
            return ""
        found = {name: self._ratio(name) for name in self._predicted}
        whole = found.pop("iteration", None)
        if whole is None or 1 / TOLERANCE < whole < TOLERANCE:
            return ""
        self._told = True
        predicted = self._predicted["iteration"][1]
        apart = sorted((r, name) for name, r in found.items() if r is not None and not 1 / TOLERANCE < r < TOLERANCE)
        calls = ", ".join(f"{name} {ratio:.2g} x" for ratio, name in (apart if whole < 1 else reversed(apart)))
        return (
            f"the plan predicts {predicted:.3g} s an iteration, the last {WINDOW} took {predicted * whole:.3g} s"
            + (f" ({calls})" if calls else "")
            + ": another plan may be faster. `realplan profile` measures this machine,"
            " `realplan search --measured OUTPUT` plans again with what this run measures"
        )

    def _ratio(self, name: str) -> float | None:
        """Measured seconds over predicted ones; None where one of them is missing."""
        key, predicted = self._predicted[name]
        measured = [metrics[key] for metrics in self._last if key in metrics]
        return median(measured) / predicted if measured and predicted > 0 else None
