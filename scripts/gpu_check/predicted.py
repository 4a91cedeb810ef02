"""Predicted seconds of a plan from a cost table."""

from __future__ import annotations

from pathlib import Path

from cost_models.estimate import cost_plan
from plans.plan import ExecutionPlan


def predicted_seconds(plan: ExecutionPlan, table: Path) -> tuple[dict[str, float], bool]:
    """Seconds of every call and of the `iteration`, by the default engine calibrated with the table; whether it fits."""
    cost = cost_plan(plan, str(table))
    return {**cost.durations.seconds, "iteration": cost.iteration_s}, cost.fits
