"""The scripts start, and a fit finds the library and the published rows."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
NAMES = (
    "bench_async",
    "bench_costs",
    "bench_generation",
    "bench_predictions",
    "bench_search",
    "demo",
    "fit_engines",
    "gpu_packages",
    "import_aiconfigurator",
    "improve_variants",
)


def run_script(name: str, *words: str) -> str:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_script_says_what_it_does(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has imported most of what they import."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # some add to it
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    assert not ended.value.code and "usage:" in capsys.readouterr().out


def test_constants_are_fitted_to_published_rows() -> None:
    found = re.search(r"6 rows, ([\d.]+) % -> ([\d.]+) %", run_script("fit_engines", "--only", "cuda-graphs"))
    assert found is not None
    before, after = float(found[1]), float(found[2])
    assert after < before and after < 12.0


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.mark.usefixtures("scripts")
def test_predictions_are_judged_by_every_bar() -> None:
    """13 plans of 1 to 4 s, each measured 5 % longer; a plan on 4 ranks that is far off does not count."""
    bench = importlib.import_module("bench_predictions")
    predicted = [1 + n / 4 for n in range(13)]
    rows = [{"ranks": 2, "predicted_s": s, "measured_s": s / 0.95, "calls": {}} for s in predicted]
    calls = {"actor_train": {"predicted_s": 1.0, "measured_s": 2.0}}
    found = bench.figures([{**row, "calls": calls} for row in rows] + [rows[0] | {"ranks": 4, "measured_s": 90.0}])
    assert found == {
        "plans": 13, "span": 4.0, "iteration_mape": 0.05, "iteration_spearman": 1.0, "call_mape": 0.5,
    }  # fmt: skip
    assert bench.bars(found) == dict.fromkeys(bench.BARS, True)
    for name, wrong in (("plans", 11), ("span", 2.9), ("iteration_mape", 0.09), ("iteration_spearman", float("nan"))):
        assert bench.bars(found | {name: wrong}) == dict.fromkeys(bench.BARS, True) | {name: False}
    assert not any(bench.bars(bench.figures(rows[:1])).values())


@pytest.mark.usefixtures("scripts")
def test_sums_are_held_apart_and_checked(tmp_path: Path) -> None:
    arithmetic = importlib.import_module("arithmetic")
    arithmetic.write_problems(tmp_path / "train.jsonl", tmp_path / "held-out.jsonl", seed=3)
    train, held_out = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("train.jsonl", "held-out.jsonl")
    )
    asked = [problem["messages"][1]["content"] for problem in (*train, *held_out)]
    assert len(held_out) == 200 and len(set(asked)) == len(asked) == 900
    for problem in held_out:
        a, b = map(int, re.findall(r"\d+", problem["messages"][1]["content"]))
        assert problem["answer"] == str(a + b)
    worth = {" 42": 1.0, "42.": 1.0, " 42\n\nThe": 0.5, " 41": 0.0, " 421": 0.0, "It is 42": 0.0, "": 0.0}
    assert {response: arithmetic.score(response, "42") for response in worth} == worth


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize(("won", "lost", "p", "code"), [(20, 5, "4.1e-03", 1), (40, 5, "7.9e-08", 0), (0, 0, "1.0", 1)])
def test_gains_of_held_out_problems_must_be_beyond_chance(
    won: int, lost: int, p: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = 200 - won - lost
    lines = [[0.5] * won + [1.0] * lost + [0.0] * rest, [1.0] * won + [0.5] * lost + [0.0] * rest]
    text = "".join(json.dumps({"scores": scores}) + "\n" for scores in lines)
    (tmp_path / "evaluation.jsonl").write_text(text)
    assert importlib.import_module("demo").solved(tmp_path) == code
    said = capsys.readouterr().out
    assert f"{lost} of 200 before, {won} after" in said and f"McNemar p = {p}" in said
