"""The validation report for people (tables) and programs (JSON); the body of `realplan validate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cost_models.validation.row_results import RowResult
from cost_models.validation.validation import GroupResult, Report, validate


def run_validate(files: list[Path] | None, as_json: bool) -> int:
    """Recompute the rows of files (default: the package's), print the report, return the exit code."""
    report = validate(files)
    if as_json:
        print(json.dumps(as_document(report), indent=1))
    else:
        render(report, Console(width=max(Console().width, 100)))
    return 0


def as_document(report: Report) -> dict[str, Any]:
    """`{"rows": [{"id", "quantity", "unit", "predicted", "measured", "source"}], "groups": [...]}`."""
    return {"rows": [_row_document(row) for row in report.rows], "groups": [asdict(group) for group in report.groups]}


def _row_document(row: RowResult) -> dict[str, Any]:
    document: dict[str, Any] = {
        "id": row.id,
        "quantity": row.quantity,
        "unit": row.unit,
        "predicted": row.predicted,
        "measured": row.measured,
        "source": "analytic",
    }
    if row.predicted is None:
        return document | {"measured": row.measured or None, "reason": row.reason}
    return document | {"error": row.error, "counted": row.counted}


def render(report: Report, console: Console) -> None:
    """Rows, then groups, then rankings."""
    console.print(_row_table(report))
    plain = [group for group in report.groups if group.kendall_tau is None]
    console.print(_group_table([g for g in plain if " | " not in g.name], "Groups of counted rows"))
    console.print(_group_table([g for g in plain if " | " in g.name], "Source x GPU x model family, counted rows"))
    console.print(_ranking_table([g for g in report.groups if g.kendall_tau is not None]))


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def _row_table(report: Report) -> Table:
    table = Table(title="Rows: predicted and measured", title_justify="left")
    for column in ("row", "quantity"):
        table.add_column(column, overflow="fold")
    for column in ("predicted", "measured", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.rows:
        if row.predicted is None:
            table.add_row(row.id, row.quantity, row.reason, _quantity(row.measured, row.unit), "", style="dim")
        else:
            figures = (_quantity(row.predicted, row.unit), _quantity(row.measured, row.unit), _percent(row.error))
            table.add_row(row.id, row.quantity, *figures, style="" if row.counted else "dim")
    return table


def _quantity(value: float, unit: str) -> str:
    return f"{value:.4g} {unit}"


def _group_table(groups: list[GroupResult], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("group", overflow="fold")
    table.add_column("quantity", overflow="fold")
    for column in ("rows", "MAPE", "bias", "strawman"):
        table.add_column(column, justify="right", no_wrap=True)
    for g in groups:
        figures = (_percent(g.mape), _percent(g.bias), _percent(g.strawman_mape))
        table.add_row(g.name, g.quantity, str(g.rows), *figures)
    return table


def _ranking_table(groups: list[GroupResult]) -> Table:
    table = Table(title="Plans of one model on one cluster (strawman in brackets)", title_justify="left")
    table.add_column("model | cluster | batch", overflow="fold")
    for column in ("plans", "MAPE", "regret@1", "regret@5", "Kendall tau"):
        table.add_column(column, justify="right", no_wrap=True)
    for g in groups:
        tau = f"{g.kendall_tau:.2f} ({g.strawman_kendall_tau:.2f})"
        first = f"{_percent(g.regret_1)} ({_percent(g.strawman_regret_1)})"
        mape = f"{_percent(g.mape)} ({_percent(g.strawman_mape)})"
        table.add_row(g.name, str(g.rows), mape, first, _percent(g.regret_5), tau)
    return table
