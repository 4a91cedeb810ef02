"""The five lines of Python in the README do what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from plans.checks import check_plan
from plans.codec import load_plan

README = Path(__file__).parents[2] / "README.md"


def lines_of_python() -> str:
    """The indented block that begins with the import of the planner."""
    lines = README.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("    from planner.best import"))
    last = next(i for i, line in enumerate(lines) if i > first and not line.startswith("    "))
    return "\n".join(line[4:] for line in lines[first:last])


def test_five_lines_plan_cost_and_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = lines_of_python()
    assert len(code.splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    plan = load_plan(tmp_path / "plan.json")
    assert not check_plan(plan) and plan.estimate is not None and plan.estimate.iteration_s > 0
