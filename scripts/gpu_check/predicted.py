"""Predicted seconds of a plan from a cost table."""

from __future__ import annotations

from pathlib import Path

from cost_models.calibration.profiled import profiled_engine
from cost_models.estimate import cost_plan
from plans.plan import ExecutionPlan


def predicted_seconds(plan: ExecutionPlan, table: Path) -> tuple[dict[str, float], bool]:
    """Seconds of every call and of the `iteration` by the engine that the table makes, and whether the plan fits."""
    cost = cost_plan(plan, profiled_engine(table))
    return {**cost.durations.seconds, "iteration": cost.iteration_s}, cost.fits
