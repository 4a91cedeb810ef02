"""The validation report for people (tables) and programs (JSON); the body of `realplan validate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cost_models.validation.row_results import RowResult
from cost_models.validation.validation import Grouping, GroupResult, Report, validate
from plans.terminal import printable

NAMED_ROWS = 3
"""Rows that are named under a reason why they have no prediction."""


def run_validate(files: list[Path] | None, as_json: bool) -> int:
    """Recompute the rows of files (default: the package's), print the report, return the exit code."""
    report = validate(files)
    if as_json:
        print(json.dumps(as_document(report), indent=1, allow_nan=False))
    else:
        render(report, Console(markup=False, emoji=False, highlight=False))
    return 0


def as_document(report: Report) -> dict[str, Any]:
    """`{"rows": [{"id", "quantity", "unit", "predicted", "measured", "source"}], "groups": [...]}`.

    The source is analytic throughout: none of the published engines goes by kernel tables.
    """
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
    """Rows, then groups, then rankings; what is empty is left out."""
    predicted = [row for row in report.rows if row.predicted is not None]
    missing = [row for row in report.rows if row.predicted is None]
    if predicted:
        console.print(_row_table(predicted))
    if missing:
        console.print(_reason_table(missing))
    if not any(row.counted for row in predicted):
        console.print("No row counts for the figures: none is predicted and counted by its `bar`.")
    groups = {grouping: [g for g in report.groups if g.grouping == grouping] for grouping in Grouping}
    if groups[Grouping.KIND]:
        console.print(_group_table(groups[Grouping.KIND], "Groups of counted rows"))
    if groups[Grouping.FAMILY]:
        console.print(_group_table(groups[Grouping.FAMILY], "Source x GPU x model family, counted rows"))
    if groups[Grouping.PLANS]:
        console.print(_ranking_table(groups[Grouping.PLANS]))


def _shown(text: str) -> str:
    """A text of a file that any terminal can take: line breaks and other unprintable characters are spelled out."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def _row_table(rows: list[RowResult]) -> Table:
    table = Table(
        title="Rows: predicted and measured (dim: does not count)",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("row", overflow="fold")
    for column in ("quantity", "predicted", "measured", "error"):
        table.add_column(column, justify="left" if column == "quantity" else "right", no_wrap=True)
    for row in rows:
        figures = (_quantity(row.predicted, row.unit), _quantity(row.measured, row.unit), _percent(row.error))
        table.add_row(_shown(row.id), row.quantity, *figures, style="" if row.counted else "dim")
    return table


def _reason_table(rows: list[RowResult]) -> Table:
    """Why rows have no prediction, and which: the first of each reason and how many more."""
    table = Table(title="Rows without a prediction", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("reason", overflow="fold")
    table.add_column("quantities", justify="right", no_wrap=True)
    table.add_column("rows", overflow="fold")
    for reason, group in groupby(sorted(rows, key=lambda row: (row.reason, row.id)), key=lambda row: row.reason):
        members = list(group)
        ids = list(dict.fromkeys(row.id for row in members))
        more = f" and {len(ids) - NAMED_ROWS} more" if len(ids) > NAMED_ROWS else ""
        table.add_row(_shown(reason), str(len(members)), _shown(", ".join(ids[:NAMED_ROWS])) + more)
    return table


def _quantity(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.4g} {unit}"


def _group_table(groups: list[GroupResult], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("group", overflow="fold")
    table.add_column("quantity", no_wrap=True)
    for column in ("rows", "MAPE", "bias", "strawman"):
        table.add_column(column, justify="right", no_wrap=True)
    for g in groups:
        figures = (_percent(g.mape), _percent(g.bias), _percent(g.strawman_mape))
        table.add_row(_shown(g.name), g.quantity, str(g.rows), *figures)
    return table


def _ranking_table(groups: list[GroupResult]) -> Table:
    table = Table(title="Plans of one model on one cluster (strawman in brackets)", title_justify="left")
    table.add_column("model | cluster | batch", overflow="fold")
    for column in ("plans", "MAPE", "regret@1", "regret@5", "Kendall tau"):
        table.add_column(column, justify="right", no_wrap=True)
    for g in groups:
        tau = _against(_two_digits(g.kendall_tau), _two_digits(g.strawman_kendall_tau))
        first = _against(_percent(g.regret_1), _percent(g.strawman_regret_1))
        mape = _against(_percent(g.mape), _percent(g.strawman_mape))
        table.add_row(_shown(g.name), str(g.rows), mape, first, _percent(g.regret_5), tau)
    return table


def _two_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _against(figure: str, strawman: str) -> str:
    """A figure with the strawman's below it, in brackets."""
    return f"{figure}\n({strawman})" if strawman else figure
