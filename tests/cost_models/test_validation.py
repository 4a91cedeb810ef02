"""The published measurements within the errors that were promised, and reports that can be trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_models.validation.predictions import PREDICTORS
from cost_models.validation.published import library_files, read_rows
from cost_models.validation.row_schema import TIME_QUANTITIES
from cost_models.validation.validation import Grouping, Report, regret, validate
from cost_models.validation.validation_report import as_document, run_validate
from plans.errors import SpecError

LIMITS = {
    ("megatron", "step_time_s"): 0.10,
    ("fsdp", "step_time_s"): 0.10,
    ("simumax", "step_time_s"): 0.08,
    ("vtrain-multi", "step_time_s"): 0.12,
    ("eager-vllm", "decode_ms_per_token"): 0.12,
    ("cuda-graphs", "decode_ms_per_token"): 0.12,
    ("eager-vllm", "prefill_ms"): 0.15,
    ("trt-llm", "prefill_ms"): 0.15,
    ("fastertransformer", "total_latency_ms"): 0.15,
    ("real-heuristic", "iteration_s"): 0.15,
}


@pytest.fixture(scope="module")
def report() -> Report:
    return validate()


@pytest.mark.parametrize(("group", "quantity"), LIMITS)
def test_errors_stay_within_limits(report: Report, group: str, quantity: str) -> None:
    found = next(g for g in report.groups if (g.name, g.quantity) == (group, quantity))
    assert found.mape <= LIMITS[group, quantity]
    assert found.strawman_mape is not None
    assert found.mape < found.strawman_mape


def test_best_plans_are_found(report: Report) -> None:
    rankings = [g for g in report.groups if g.kendall_tau is not None]
    assert {g.name.split(" ")[0] for g in rankings} >= {"gpt-3.6B", "gpt-39.1B"}
    for group in rankings:
        assert group.regret_1 is not None
        assert group.strawman_regret_1 is not None
        assert group.regret_1 <= min(0.02, group.strawman_regret_1)


def test_sizes_of_ppo_iterations_are_in_order(report: Report) -> None:
    rows = [r for r in report.rows if r.quantity == "iteration_s"]
    predicted, measured = (np.array([getattr(r, name) for r in rows]) for name in ("predicted", "measured"))
    apart = measured[:, None] > 1.2 * measured[None, :]
    assert apart.any()
    assert np.all((predicted[:, None] > predicted[None, :])[apart])


def test_every_row_is_answered(report: Report) -> None:
    given = {str(row["id"]) for path in library_files() for row in read_rows(path)}
    assert {r.id for r in report.rows} == given
    for row in report.rows:
        assert (row.predicted is None) == bool(row.reason)
        assert row.predicted is None or row.predicted > 0


def test_json_names_rows_and_sources(report: Report) -> None:
    document = json.loads(json.dumps(as_document(report)))
    for row in document["rows"]:
        assert {"id", "quantity", "unit", "predicted", "measured", "source"} <= set(row)
        assert row["source"] == "analytic"


def row(**changes: Any) -> dict[str, Any]:
    base = next(r for path in library_files() for r in read_rows(path) if r["id"] == "vtrain-multi-0")
    return dict(base) | changes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu": "TPU-v4"}, "TPU-v4"),
        ({"precision": "fp8"}, "fp8"),
        ({"mbs": None}, "mbs is not published"),
        ({"mbs": -1}, "positive"),
        ({"tp": 1.5}, "whole"),
        ({"arch": {"layers": 4}}, "hidden"),
        ({"measured": {"step_time_s": -3.0}}, "positive"),
        ({"measured": {"loss": 2.5}}, "no model of `loss`"),
        ({"engine": "colossal"}, "colossal"),
    ],
)
def test_rows_that_cannot_be_predicted_say_why(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": [row(**changes)]}))
    (result,) = validate([path]).rows
    assert result.predicted is None
    assert reason in result.reason


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("{")
    with pytest.raises(SpecError, match=r"rows\.json:1"):
        validate([path])
    path.write_text(json.dumps({"rows": [{"measured": {}}]}))
    with pytest.raises(SpecError, match="there is no `id`"):
        validate([path])


def test_ties_are_not_luck() -> None:
    assert regret(np.array([1.0, 1.0, 2.0]), np.array([5.0, 4.0, 3.0]), 1) == pytest.approx(5 / 3 - 1)
    assert regret(np.array([1.0, 1.0, 2.0]), np.array([5.0, 4.0, 3.0]), 3) == 0


def test_command_prints_both_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row()]))
    assert run_validate([path], as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["id"] == "vtrain-multi-0"
    assert run_validate([path], as_json=False) == 0
    assert "vtrain-multi-0" in capsys.readouterr().out


def written(tmp_path: Path, *rows: dict[str, Any], name: str = "rows.json") -> Path:
    path = tmp_path / name
    path.write_text(json.dumps({"rows": rows}))
    return path


def test_names_of_quantities_are_those_of_the_predictors() -> None:
    assert tuple(PREDICTORS) == TIME_QUANTITIES


def test_plans_that_are_predicted_alike_have_no_tau(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, *(row(id=f"r{n}", measured={"step_time_s": 3.0 + n}) for n in range(4)))
    plans = next(g for g in validate([path]).groups if g.grouping == Grouping.PLANS)
    assert plans.kendall_tau is None and plans.regret_1 is not None
    run_validate([path], as_json=True)
    json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    run_validate([path], as_json=False)
    assert "nan" not in capsys.readouterr().out


def test_tables_fit_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run_validate(None, as_json=False)
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= 80
    assert "\u2026" not in printed


def test_groups_go_by_field_and_texts_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = written(tmp_path, row(id="[/red] \ud800\n:x:", group="a | b"))
    assert next((g.grouping, g.name) for g in validate([path]).groups) == (Grouping.KIND, "a | b")
    run_validate([path], as_json=False)
    printed = capsys.readouterr().out
    assert "[/red] \\ud800\\n:x:" in printed
    assert printed.index("Groups of counted rows") < printed.index("a | b") < printed.index("Source x GPU")


def test_one_sentence_where_no_row_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_validate([written(tmp_path, row(bar=False))], as_json=False)
    printed = capsys.readouterr().out
    assert "No row counts for the figures" in printed and "MAPE" not in printed


def test_reasons_name_the_file_among_several(tmp_path: Path) -> None:
    good, bad = written(tmp_path, row(), name="good.json"), written(tmp_path, row(mbs=None), name="bad.json")
    assert validate([bad]).rows[0].reason == "mbs is not published"
    assert [r.reason for r in validate([good, bad]).rows] == ["", f"{bad}: mbs is not published"]
