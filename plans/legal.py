"""Plans from files, legal or refused with all that is wrong."""

from __future__ import annotations

from pathlib import Path

from plans.checks import check_plan
from plans.codec import BadPlan, load_plan, plan_text
from plans.documents import locate
from plans.plan import ExecutionPlan


def legal_plan(path: Path) -> ExecutionPlan:
    """A plan that keeps every rule of `plans.checks`; raises BadPlan with all that it breaks, located."""
    plan = load_plan(path)
    problems = check_plan(plan)
    if problems:
        raise BadPlan(str(path), locate(plan_text(path), problems))
    return plan
