"""What a run has left in its output folder: plan, metrics, evaluations, samples and timeline."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from plans.documents import BadText, parse_json, read_text
from plans.errors import PlanError
from plans.legal import legal_plan
from plans.plan import ExecutionPlan
from plans.run_output import EVALUATIONS, METRICS, PLAN, SAMPLES, TIMELINE
from plans.timeline import Timeline, load_timeline

MOST_BYTES = 512 * 2**20
HINT = "the output folder of a run"


@dataclass(frozen=True)
class RunFiles:
    """A run so far. metrics: a row per iteration, indexed by it. evaluations: a row per evaluation, indexed by the
    iterations done, and the lines themselves; samples: lines of `samples.jsonl`."""

    plan: ExecutionPlan
    metrics: pd.DataFrame
    evaluations: pd.DataFrame
    evaluated: tuple[Mapping[str, Any], ...]
    samples: tuple[Mapping[str, Any], ...]
    timeline: Timeline | None


def read_run(folder: Path) -> RunFiles:
    """Read a run's output; its last line may be half written. Raises PlanError for what no run has written, located."""
    if not os.path.isfile(folder / METRICS):
        raise PlanError(f"`{folder}` has no {METRICS}", HINT)
    plan = legal_plan(folder / PLAN)
    evaluated, timeline = tuple(_lines(folder / EVALUATIONS)), folder / TIMELINE
    return RunFiles(
        plan=plan,
        metrics=_table(_lines(folder / METRICS)),
        evaluations=_table(evaluated),
        evaluated=evaluated,
        samples=tuple(_lines(folder / SAMPLES)),
        timeline=load_timeline(timeline) if os.path.isfile(timeline) else None,
    )


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """Lines of JSON objects with an iteration; none of a file that is not there."""
    if not os.path.isfile(path):
        return
    text = read_text(path, PlanError, path.name, HINT, MOST_BYTES)
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            found = parse_json(line)
        except BadText as error:
            raise PlanError(f"{path}:{number}:{error.problem.column or 1}: {error.problem.message}", HINT) from None
        if not isinstance(found, dict) or not isinstance(found.get("iteration"), int):
            raise PlanError(f"{path}:{number}:1: it is no line of a run: an object with its `iteration`", HINT)
        yield found


def _table(lines: Iterator[Mapping[str, Any]] | tuple[Mapping[str, Any], ...]) -> pd.DataFrame:
    """The numbers of some lines, one column per name."""
    rows = [
        {name: value for name, value in line.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
        for line in lines
    ]
    return pd.DataFrame(rows).set_index("iteration") if rows else pd.DataFrame()
