"""`realplan report`."""

from __future__ import annotations

from pathlib import Path

from planner.cli.output import write
from plans.errors import PlanError
from plans.files import check_target
from plans.run_output import PAGE


def report_command(folder: Path, *, output: Path | None) -> int:
    """Write the page of a run's output folder, beside its files unless `output` says where."""
    target = output or folder / PAGE
    check_target(target)
    from cost_models.estimate import cost_plan
    from planner.cli.engine_words import plan_engine
    from planner.pictures.run_files import read_run
    from planner.pictures.run_page import run_page, title_of

    run = read_run(folder)
    if run.metrics.empty:
        raise PlanError(f"the run in `{folder}` has finished no iteration", "a run that has")
    write(target, run_page(run, cost_plan(run.plan, plan_engine(run.plan)), title_of(run.plan, folder.resolve().name)))
    return 0
