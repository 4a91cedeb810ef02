"""The page of a run: what its files say, drawn; a browser sees every bar and no error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from browsers import CHROMIUM, NO_CHROMIUM, browser, reported
from plan_cases import tiny_plan

from cost_models.estimate import cost_plan
from planner.cli.commands.report import report_command
from planner.pictures.curves import HEIGHT, WIDTH, Curve, curve_html, round_values
from planner.pictures.run_files import read_run
from planner.pictures.run_page import last_iterations
from plans.codec import save_plan
from plans.errors import PlanError
from plans.timeline import Span, Timeline

ITERATIONS = 30
EVIL = "<script>alert(1)</script>"
PLACES = {
    "actor_generate": "d2 t1 p1",
    "ref_infer": ("node 0 gpu 1", "d1 t1 p1"),
    "actor_train": ("node 0 gpu 0", "d1 t1 p1"),
}


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run whose numbers are known: rewards 0, 1, 2, ...; two seconds an iteration."""
    place = tmp_path_factory.mktemp("run")
    plan = tiny_plan(2, PLACES, algorithm="grpo", order=tuple(PLACES), batch_size=4, group_size=2, minibatches=1)
    save_plan(plan, place / "plan.json")
    rows = [
        {
            "iteration": i, "critic/score/mean": float(i), "timing_s/step": 2.0, "perf/throughput": 100.0,
            "plan/actor_train/measured_s": 0.5, "actor/kl_loss": None, "plan/peak/rank_1_gib": 0.5,
        }
        for i in range(ITERATIONS)
    ]  # fmt: skip
    (place / "metrics.jsonl").write_text(lines(*rows) + '{"iteration": 30, "crit')
    samples = [[{"prompt": EVIL, "response": text, "score": score}] for text, score in (("bad", 0.25), ("good", 0.75))]
    evaluated = [
        {"iteration": n, "val/score/mean": s[0]["score"], "samples": s} for n, s in zip((0, 30), samples, strict=True)
    ]
    (place / "evaluation.jsonl").write_text(lines(*evaluated))
    (place / "samples.jsonl").write_text(lines({"iteration": 29, "sample": 0, "prompt": "p", "response": "r" * 5000}))
    spans = [
        Span(name=name, kind="call", iteration=i, start_s=2.0 * i + start, end_s=2.0 * i + end, ranks=ranks)
        for i in range(ITERATIONS)
        for name, start, end, ranks in (("actor_generate", 0.0, 1.0, (0, 1)), ("actor_train", 1.0, 1.5, (0,)))
    ]
    Timeline(source="measured", period_s=2.0, spans=tuple(spans)).save(place / "timeline.json")
    return place


def test_a_page_says_what_the_files_say(folder: Path) -> None:
    assert report_command(folder, output=None) == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert EVIL not in text and "&lt;script&gt;alert(1)" in text
    assert "http" not in text.replace("http://www.w3.org", "") and "rrrr ..." in text
    assert '<b class="">30</b>' in text and ">2 s</b>" in text
    assert "26</b><span>reward of the last quarter of the run, 3 of the first" in text
    assert "0.75</b><span>score of the last evaluation, 0.25 of the first" in text
    assert re.search(r"<td>actor_train</td><td>[\d.]+</td><td>0.500</td>", text)
    peak_gib = float(cost_plan(read_run(folder).plan).memory.by_rank[1]) / 2**30  # CPU devices have no context
    assert f"<td>rank 1</td><td>{peak_gib:.3f}</td><td>0.500</td>" in text and "<td>rank 0</td>" not in text
    assert "KL loss" not in text  # nothing but null
    assert (
        'actor_generate <tspan class="n">27' in text
        and 'actor_generate <tspan class="n">26' not in text.split("predicted</h2>")[0]
    )


def test_a_curve_lies_where_its_numbers_are() -> None:
    html = curve_html(Curve("reward", pd.Series([0.0, 10.0, 5.0], index=[0, 1, 2])))
    points = [tuple(map(float, p.split(","))) for p in re.findall(r'd="M([^"]*)"', html)[0].split(" L")]
    (left, low), (_, high), (right, middle) = points
    assert left < right <= WIDTH and 0 <= high < middle < low <= HEIGHT
    assert middle == pytest.approx((low + high) / 2, abs=0.06) and points[1][0] == pytest.approx(
        (left + right) / 2, abs=0.06
    )
    assert ">5</span>" in html and curve_html(Curve("x", pd.Series([float("nan")]))) == ""
    assert len(re.findall("<path", curve_html(Curve("x", pd.Series(range(50), dtype=float))))) == 2  # and its mean
    assert "<path" in curve_html(Curve("same", pd.Series([3.0, 3.0])))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 7.7), (0.28, 0.31), (1e-7, 3e-7), (120.0, 99_000.0)])
def test_round_values_lie_within(low: float, high: float) -> None:
    found = round_values(low, high)
    assert 2 <= len(found) <= 6 and low - 1e-9 * abs(low) <= found[0] and found[-1] <= high * (1 + 1e-9)


def test_a_torn_last_line_is_no_error_and_others_are_located(folder: Path, tmp_path: Path) -> None:
    assert len(read_run(folder).metrics) == ITERATIONS
    with pytest.raises(PlanError, match="has no metrics"):
        read_run(tmp_path)
    save_plan(read_run(folder).plan, tmp_path / "plan.json")
    for text, where in (('{"iteration": 0}\n{"x": \n', "2:7"), ("[]\n", "1:1"), ('{"iteration": "a"}\n', "1:1")):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(PlanError, match=f"metrics.jsonl:{where}: "):
            read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(PlanError, match="finished no iteration"):
        report_command(tmp_path, output=None)


def test_the_last_iterations_begin_at_zero(folder: Path) -> None:
    timeline = read_run(folder).timeline
    assert timeline is not None
    spans = last_iterations(timeline, 3).spans
    assert {span.iteration for span in spans} == {27, 28, 29}
    assert min(span.start_s for span in spans) == 0 and max(span.end_s for span in spans) == pytest.approx(5.5)


@pytest.mark.skipif(not CHROMIUM, reason=NO_CHROMIUM)
def test_a_browser_draws_the_page(folder: Path, tmp_path: Path) -> None:
    report_command(folder, output=tmp_path / "report.html")
    data = reported(browser(tmp_path / "report.html", tmp_path / "profile"))
    assert "error" not in data and data["ready"] == "yes" and int(data["bars"]) == int(data["drawn"]) > 6
