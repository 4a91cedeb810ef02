"""Plans from files, as commands want them: legal, or an error that names every problem."""

from __future__ import annotations

from pathlib import Path

from plans.checks import check_plan
from plans.codec import load_plan, plan_text
from plans.documents import locate
from plans.errors import PlanError
from plans.plan import ExecutionPlan


def legal_plan(path: Path) -> ExecutionPlan:
    """A plan that keeps every rule of `plans.checks`; raises PlanError with all that it breaks."""
    plan = load_plan(path)
    problems = locate(plan_text(path), check_plan(plan))
    if problems:
        raise PlanError("\n".join(problem.text(str(path)) for problem in problems))
    return plan
