"""Validation: every published row recomputed, and errors by group.

Rows that count for the figures carry `bar`; where none of the rows does, all that are predicted count. Groups are: all
counted rows of a kind (`group` and quantity), the same by source, GPU and model family, and for every model on one
cluster with several plans how well the plans are ranked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import kendalltau

from cost_models.validation.published import GPU_NAMES, Row, library_files, read_rows
from cost_models.validation.row_results import RowResult, row_results
from cost_models.validation.strawman import fitted

FEWEST_PLANS = 4
"""Plans of one model on one cluster from which a ranking is reported."""


class Grouping(StrEnum):
    """What the rows of a group have in common."""

    KIND = "kind"
    FAMILY = "family"
    PLANS = "plans"


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """Errors of a group of rows, as fractions. Ranking figures are None for groups that are not plans of one model on
    one cluster, and Kendall's tau for plans that are all predicted alike. `strawman_*` are the same of the one-constant
    model."""

    grouping: Grouping
    name: str
    quantity: str
    rows: int
    mape: float
    bias: float
    strawman_mape: float | None = None
    regret_1: float | None = None
    regret_5: float | None = None
    kendall_tau: float | None = None
    strawman_regret_1: float | None = None
    strawman_kendall_tau: float | None = None


@dataclass(frozen=True)
class Report:
    """All rows, and groups from the widest to the rankings."""

    rows: tuple[RowResult, ...]
    groups: tuple[GroupResult, ...]


def validate(files: Iterable[Path] | None = None) -> Report:
    """Recompute the rows of measurement files (default: those that the package carries)."""
    paths = library_files() if files is None else list(files)
    rows = _distinct_rows(paths)
    all_count = all(row.get("bar") is None for _, row in rows)
    results = []
    for path, row in rows:
        for result in row_results(row):
            where = f"{path}: " if result.reason and files is not None and len(paths) > 1 else ""
            results.append(replace(result, all_count=all_count, reason=where + result.reason))
    table = _table(results)
    counted = table[table["counted"]]
    groups = (*_groups(counted, Grouping.KIND), *_groups(counted, Grouping.FAMILY), *_rankings(table))
    return Report(tuple(results), groups)


def _table(results: Sequence[RowResult]) -> pd.DataFrame:
    """A line for every prediction; in the columns of `Grouping` the name of its group. Of `naive` NaN is none."""
    predicted = [r for r in results if r.predicted is not None]
    return pd.DataFrame(
        {
            Grouping.KIND: [_kind(r) for r in predicted],
            Grouping.FAMILY: [_family(r) for r in predicted],
            Grouping.PLANS: [_plans_of(r) for r in predicted],
            "quantity": [r.quantity for r in predicted],
            "counted": np.array([r.counted for r in predicted], dtype=bool),
            "gpus": np.array([bool(r.row.get("gpus")) for r in predicted], dtype=bool),
            "predicted": np.array([r.predicted for r in predicted], dtype=np.float64),
            "measured": np.array([r.measured for r in predicted], dtype=np.float64),
            "naive": np.array([r.naive for r in predicted], dtype=np.float64),
        }
    )


def _distinct_rows(paths: Iterable[Path]) -> list[tuple[Path, Row]]:
    """All rows with their files; of rows that are equal in everything only the first."""
    found: dict[str, tuple[Path, Row]] = {}
    for path in paths:
        for row in read_rows(path):
            found.setdefault(json.dumps(row, sort_keys=True), (path, row))
    return list(found.values())


def _kind(result: RowResult) -> str:
    return str(result.row.get("group") or result.row.get("plan") or "rows")


def _family(result: RowResult) -> str:
    row = result.row
    source = re.split(r"[ ,;(]", str(row.get("source") or row.get("plan") or "unnamed"))[0]
    model = str(row.get("model") or "ppo")
    family = re.split(r"[-_0-9]", model)[0] or model
    gpu = str(row.get("gpu") or "")
    return " | ".join(part for part in (_kind(result), source, GPU_NAMES.get(gpu, gpu), family) if part)


def _plans_of(result: RowResult) -> str:
    row = result.row
    cluster = f"{row.get('gpus')} x {row.get('gpu')}"
    return f"{row.get('model')} | {_kind(result)}, {cluster} | gbs {row.get('gbs')} seq {row.get('seq_len')}"


def _groups(table: pd.DataFrame, grouping: Grouping) -> list[GroupResult]:
    return [GroupResult(**_errors(name, rows, grouping)) for name, rows in table.groupby([grouping, "quantity"])]


def _errors(name: tuple[Hashable, ...], rows: pd.DataFrame, grouping: Grouping) -> dict[str, Any]:
    """What every group has of `GroupResult`."""
    error, naive = rows["predicted"] / rows["measured"] - 1.0, _strawman(rows)
    return {
        "grouping": grouping,
        "name": str(name[0]),
        "quantity": str(name[1]),
        "rows": len(rows),
        "mape": float(error.abs().mean()),
        "bias": float(error.mean()),
        "strawman_mape": None if naive is None else float((naive / rows["measured"] - 1.0).abs().mean()),
    }


def _strawman(rows: pd.DataFrame) -> NDArray[np.float64] | None:
    """The strawman's predictions, where it has one for every row."""
    return None if rows["naive"].isna().any() else fitted(rows["naive"].to_numpy(), rows["measured"].to_numpy())


def _rankings(table: pd.DataFrame) -> Iterator[GroupResult]:
    """Models on one cluster and batch with at least FEWEST_PLANS plans."""
    steps = table[table["gpus"] & (table["quantity"] == "step_time_s")]
    for name, rows in steps.groupby([Grouping.PLANS, "quantity"]):
        if len(rows) < FEWEST_PLANS:
            continue
        predicted, measured, naive = rows["predicted"].to_numpy(), rows["measured"].to_numpy(), _strawman(rows)
        yield GroupResult(
            **_errors(name, rows, Grouping.PLANS),
            regret_1=regret(predicted, measured, 1),
            regret_5=regret(predicted, measured, 5),
            kendall_tau=_tau(predicted, measured),
            strawman_regret_1=None if naive is None else regret(naive, measured, 1),
            strawman_kendall_tau=None if naive is None else _tau(naive, measured),
        )


def regret(predicted: NDArray[np.float64], measured: NDArray[np.float64], top: int) -> float:
    """How much slower than the best plan the best of the `top` predicted ones is; ties count as the worst of them."""
    order = np.lexsort((-measured, predicted))
    return float(measured[order[:top]].min() / measured.min() - 1.0)


def _tau(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> float | None:
    """Kendall's tau, which is undefined where either side is all alike."""
    tau = float(kendalltau(predicted, measured).statistic)
    return tau if np.isfinite(tau) else None
