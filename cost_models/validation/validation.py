"""Validation: every published row recomputed, and errors by group.

Rows that count for the figures carry `bar`; where none of the rows does, all that are predicted count. Groups are: all
counted rows of a kind (`group` and quantity), the same by source, GPU and model family, and for every model on one
cluster with several plans how well the plans are ranked.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
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
    groups = (
        *_groups(results, Grouping.KIND, _kind),
        *_groups(results, Grouping.FAMILY, _family),
        *_rankings(results),
    )
    return Report(tuple(results), groups)


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


def _groups(results: Sequence[RowResult], grouping: Grouping, key: Callable[[RowResult], str]) -> list[GroupResult]:
    members = _collect((r for r in results if r.counted), key)
    groups = []
    for (name, quantity), group in sorted(members.items()):
        errors = np.array([r.error for r in group])
        groups.append(
            GroupResult(
                grouping=grouping,
                name=name,
                quantity=quantity,
                rows=len(group),
                mape=float(np.mean(np.abs(errors))),
                bias=float(np.mean(errors)),
                strawman_mape=_strawman_mape(group),
            )
        )
    return groups


def _collect(results: Iterable[RowResult], key: Callable[[RowResult], str]) -> dict[tuple[str, str], list[RowResult]]:
    members: dict[tuple[str, str], list[RowResult]] = defaultdict(list)
    for result in results:
        members[key(result), result.quantity].append(result)
    return members


def _strawman(group: Sequence[RowResult]) -> NDArray[np.float64] | None:
    if any(r.naive is None for r in group):
        return None
    return fitted([r.naive or 0.0 for r in group], [r.measured for r in group])


def _strawman_mape(group: Sequence[RowResult]) -> float | None:
    naive = _strawman(group)
    measured = np.array([r.measured for r in group])
    return None if naive is None else float(np.mean(np.abs(naive / measured - 1.0)))


def _rankings(results: Sequence[RowResult]) -> list[GroupResult]:
    """Models on one cluster and batch with at least FEWEST_PLANS plans."""
    steps = (r for r in results if r.predicted is not None and r.quantity == "step_time_s" and r.row.get("gpus"))
    rankings = []
    for (name, quantity), group in sorted(_collect(steps, _plans_of).items()):
        if len(group) < FEWEST_PLANS:
            continue
        measured = np.array([r.measured for r in group])
        predicted = np.array([r.predicted for r in group], dtype=np.float64)
        naive = _strawman(group)
        rankings.append(
            GroupResult(
                grouping=Grouping.PLANS,
                name=name,
                quantity=quantity,
                rows=len(group),
                mape=float(np.mean(np.abs(predicted / measured - 1.0))),
                bias=float(np.mean(predicted / measured - 1.0)),
                strawman_mape=_strawman_mape(group),
                regret_1=regret(predicted, measured, 1),
                regret_5=regret(predicted, measured, 5),
                kendall_tau=_tau(predicted, measured),
                strawman_regret_1=None if naive is None else regret(naive, measured, 1),
                strawman_kendall_tau=None if naive is None else _tau(naive, measured),
            )
        )
    return rankings


def regret(predicted: NDArray[np.float64], measured: NDArray[np.float64], top: int) -> float:
    """How much slower than the best plan the best of the `top` predicted ones is; ties count as the worst of them."""
    order = np.lexsort((-measured, predicted))
    return float(measured[order[:top]].min() / measured.min() - 1.0)


def _tau(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> float | None:
    """Kendall's tau, which is undefined where either side is all alike."""
    tau = float(kendalltau(predicted, measured).statistic)
    return tau if np.isfinite(tau) else None
