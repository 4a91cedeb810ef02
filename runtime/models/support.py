"""The rules of `plans.runnable` as errors, raised before anything starts. Without torch."""

from __future__ import annotations

from plans.errors import RealplanError, SpecError
from plans.layout import Layout
from plans.plan import ExecutionPlan
from plans.runnable import layout_problems, run_problems


def check_supported(plan: ExecutionPlan) -> None:
    """Raise RealplanError for an algorithm, a type or a model under a layout that a run would fail on."""
    for problem in run_problems(plan):
        raise RealplanError(problem.message, problem.hint)


def check_runnable(layout: Layout) -> None:
    """Raise SpecError unless this runtime can run the architecture under the layout."""
    for problem in layout_problems(layout):
        raise SpecError(problem.message, problem.hint)
