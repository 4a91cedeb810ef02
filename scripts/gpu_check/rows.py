"""Rows: what a case shows, written the moment it is known, so that a killed stage loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gpu_check.setting import Setting

Verdict = Literal["met", "missed", "shown", "skipped", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure. verdict: `met` or `missed` a goal, `shown` without one, `skipped` or `failed` by the note."""

    case: str
    value: float | None = None
    unit: str = ""
    goal: str = ""
    verdict: Verdict = "shown"
    note: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """A part of a stage. needs_s: it is left out when less time than that is left."""

    name: str
    run: Callable[[Setting], Iterable[Row]]
    needs_s: float = 0.0


class Skip(Exception):
    """A case that cannot run here, with the reason."""


def judged(
    case: str, value: float, unit: str, *, least: float | None = None, most: float | None = None, note: str = ""
) -> Row:
    """A row with a goal: at least, at most, or both."""
    met = (least is None or value >= least) and (most is None or value <= most)
    bounds = [f">= {least:g}" if least is not None else "", f"<= {most:g}" if most is not None else ""]
    goal = " and ".join(bound for bound in bounds if bound)
    return Row(case=case, value=value, unit=unit, goal=goal, verdict="met" if met else "missed", note=note)


def run_cases(cases: Iterable[Case], setting: Setting) -> Iterator[Row]:
    """Rows of all cases; one that fails says why in a row of its own, and the others go on."""
    for case in cases:
        if setting.left_s < case.needs_s:
            yield Row(case=case.name, verdict="skipped", note=f"{setting.left_s:.0f} s left, it needs {case.needs_s:g}")
            continue
        try:
            yield from case.run(setting)
        except Skip as reason:
            yield Row(case=case.name, verdict="skipped", note=str(reason))
        except Exception as error:
            text = " ".join(str(error).split())
            yield Row(case=case.name, verdict="failed", note=f"{type(error).__name__}: {text}"[:600])


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one JSON line to a file and give it to the system."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def append_row(path: Path, row: Row) -> None:
    """Add a row to a stage's file."""
    append(path, {"row": asdict(row)})


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a stage's file; the last line may be cut off by a kill."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found
