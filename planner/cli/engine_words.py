"""Engines from words: the name of one, two names (`megatron+cuda-graphs`), or the path of a cost table."""

from __future__ import annotations

import os
from pathlib import Path

from cost_models.engines.constants import DEFAULT_ENGINE, TABLE_SUFFIX
from cost_models.engines.engine import MEGATRON, ComposedEngine, Engine, NamedEngine
from plans.codec import load_plan
from plans.errors import RealplanError
from plans.plan import ExecutionPlan


def engine_of(words: str, table: Path | None = None) -> Engine:
    """The engine of `--engine` and `--table`. `first+second`: one for training and scoring, one for generation; a table
    calibrates the default engine wherever it stands. `engine@FOLDER`: with the times that a run has measured."""
    words, mark, folder = words.partition("@")
    if mark:
        return _of_run(Path(folder), engine_of(words, table))
    names = [words] if words.endswith(TABLE_SUFFIX) and os.path.exists(words) else words.split("+")
    if table is not None:
        _check_table(words, names, table)
    if len(names) > 2:
        raise RealplanError(
            f"--engine {words}: {len(names)} engines; there can be two, for training and scoring and for generation",
            f"`{names[0]}+{names[-1]}`, for example",
        )
    first, *rest = (_of_table(table) if table and name == DEFAULT_ENGINE else _single(name) for name in names)
    return ComposedEngine(first, rest[0]) if rest else first


def plan_engine(plan: ExecutionPlan) -> Engine:
    """The engine of the plan's own estimate."""
    return engine_of(plan.estimate.engine) if plan.estimate else MEGATRON


def planned_words(path: Path) -> str:
    """The engine of the estimate of a plan file, without what a run has measured; the default where it has none."""
    plan = load_plan(path) if os.path.isfile(path) else None
    return plan.estimate.engine.partition("@")[0] if plan and plan.estimate else DEFAULT_ENGINE


def _of_run(folder: Path, inner: Engine) -> Engine:
    from cost_models.calibration.measured_run import measured_run, run_engine

    return run_engine(measured_run(folder), inner)


def _of_table(table: Path) -> Engine:
    """The engine of a profiled machine; its fit needs scipy, which other engines do without."""
    from cost_models.calibration.profiled import profiled_engine

    return profiled_engine(table)


def _check_table(words: str, names: list[str], table: Path) -> None:
    if DEFAULT_ENGINE not in names:
        raise RealplanError(
            f"--engine {words} and --table {table}: a cost table calibrates the engine `{DEFAULT_ENGINE}`",
            "leave one of the two out",
        )
    if not os.path.isfile(table) or table.suffix != TABLE_SUFFIX:
        wrong = "a folder" if os.path.isdir(table) else "its name must end in .json"
        wrong = wrong if os.path.exists(table) else "no such file"
        raise RealplanError(f"--table {table}: {wrong}", "`realplan profile -o table.json` writes a cost table")


def _single(name: str) -> Engine:
    return _of_table(Path(name)) if name.endswith(TABLE_SUFFIX) else NamedEngine(name)
