"""`realplan check`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from cost_models.engines.engine import Engine
from cost_models.estimate import PlanCost, cost_plan
from planner.cli.output import say
from planner.remedies.memory import memory_problems
from plans.checks import check_plan, sample_problems
from plans.codec import is_stale, plan_text, read_plan, save_plan
from plans.documents import locate
from plans.files import check_target
from plans.plan import ExecutionPlan
from plans.problems import Problem
from plans.runnable import run_note, run_problems


def check_command(
    path: Path, *, write: bool, allow_long: bool, engine: Engine, as_json: bool, resume_from: Path | None = None
) -> int:
    """Every problem of a plan, or its new estimate. `allow_long` is written into the plan with `write`.
    `resume_from`: a checkpoint that the plan must be able to take up."""
    if write:
        check_target(path)
    text = plan_text(path)
    plan, problems = read_plan(text)
    if plan is not None and allow_long:
        plan = replace(plan, workload=replace(plan.workload, allow_long=True))
    cost = None
    if plan is not None:
        problems = locate(text, [*sample_problems(plan.workload), *check_plan(plan)])
        if not problems:
            cost = cost_plan(plan, engine)
            problems = locate(text, memory_problems(cost))
            if resume_from is not None and not problems:
                problems = _takeover(plan, resume_from)
    if as_json:
        rows = [{k: v for k, v in asdict(p).items() if k != "path"} for p in problems]
        refused = [p.message for p in run_problems(plan)] if plan is not None and not problems else []
        print(json.dumps({"ok": not problems, "problems": rows, "runtime_refuses": refused}))
    for problem in problems if not as_json else ():
        print(problem.text(str(path)), file=sys.stderr)
    if problems or plan is None or cost is None:
        return 1
    return _checked(path, plan, cost, write, as_json)


def _takeover(plan: ExecutionPlan, place: Path) -> list[Problem]:
    from plans.checkpoint_files import CheckpointError, find_usable

    hint = "--resume-from FOLDER, a checkpoint or the output of a run"
    try:
        found, refusals = find_usable(place, plan, whole=False)
    except CheckpointError as error:
        return [Problem("checkpoint", error.message, error.hint or hint)]
    for refusal in refusals:
        say(refusal)
    if found is None:
        return [Problem("checkpoint", f"no checkpoint in `{place}`", hint)]
    say(f"the plan can go on from {found.folder}: {found.index.iteration} iterations are done")
    if absent := found.absent:
        words = f"{len(absent)} of its {len(found.index.files)} files are not here, such as `{absent[0]}`"
        say(f"{words}: whether other machines have them, as they were written, shows when a run starts on all of them")
    return []


def _checked(path: Path, plan: ExecutionPlan, cost: PlanCost, write: bool, as_json: bool) -> int:
    stale = plan.estimate is None or is_stale(plan)
    if write:
        save_plan(plan.with_estimate(cost.estimate), path)
    if not as_json:
        memory = f"peak {cost.memory.peak_gib:.1f} of {plan.cluster.gpu.memory_gib:g} GiB in {cost.memory.peak_step}"
        print(f"ok: {cost.iteration_s:.4g} s per iteration, {memory}")
        if note := run_note(plan):
            say(note)
        if stale and not write:
            print(f"the estimate in the file is out of date: `realplan check --write {path}`", file=sys.stderr)
    return 0
