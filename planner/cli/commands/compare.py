"""`realplan compare` and `realplan diff`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cost_models.estimate import cost_plan
from planner.baselines import Contender
from planner.cli.engine_words import engine_of, plan_engine
from planner.cli.output import limits_note, say, write
from planner.pictures.compare import baselines as all_baselines
from planner.pictures.compare import compare, compare_page, render_rows
from planner.pictures.diff import changes, effects, render_diff
from plans.errors import Infeasible
from plans.files import check_target
from plans.legal import legal_plan


def compare_command(paths: Sequence[Path], *, baselines: bool, html: Path | None, engine: str, as_json: bool) -> int:
    """The table of several plans and, where asked, of the baselines for the first one's workload."""
    if html:
        check_target(html)
    plans = [legal_plan(path) for path in paths]
    runs = engine_of(engine) if engine else plan_engine(plans[0])
    names = [path.stem for path in paths]
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    contenders = [
        Contender(name=name, cost=cost_plan(plan, runs), engines=runs.name)
        for name, plan in zip(names, plans, strict=True)
    ]
    missing: dict[str, Infeasible] = {}
    if baselines:
        found, missing = all_baselines(plans[0], runs)
        if note := limits_note(plans[0]):
            say(note)
        contenders += found
    rows = compare(contenders, runs)
    if as_json:
        print(
            json.dumps({"plans": [asdict(row) for row in rows], "missing": {k: v.reason for k, v in missing.items()}})
        )
    else:
        print(render_rows(rows, missing))
    if any((p.workload, p.cluster) != (plans[0].workload, plans[0].cluster) for p in plans[1:]):
        print("the plans are for different workloads or clusters: ratios compare unlike things", file=sys.stderr)
    if html:
        write(html, compare_page(contenders, runs, "Plans compared"))
    return 0


def diff_command(before: Path, after: Path, *, as_json: bool) -> int:
    """What changed between two plans."""
    plans = [legal_plan(path) for path in (before, after)]
    costs = [cost_plan(plan, plan_engine(plans[0])) for plan in plans]
    found = changes(*plans)
    if as_json:
        rows = {"changes": [asdict(c) for c in found], "effects": [asdict(e) for e in effects(*costs)]}
        print(json.dumps({**rows, "iteration_s": [cost.iteration_s for cost in costs]}))
    else:
        print(render_diff(found, *costs))
    return 0
