"""The commands that look at plans, as a user types them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from plan_cases import tiny_plan
from typer.testing import CliRunner

from cost_models.estimate import cost_plan
from planner.cli.app import app
from planner.pictures.compare import deciding_term
from planner.pictures.headline import ENGINE, headline_rows, render_headline
from plans.codec import save_plan
from plans.errors import Infeasible, PlanError
from plans.plan import ExecutionPlan


@pytest.fixture
def plan(tmp_path: Path) -> ExecutionPlan:
    plan = tiny_plan(4, {
        "actor_generate": ("node 0 gpus 0-1", "d2 t1 p1"),
        "ref_infer": ("node 0 gpus 2-3", "d2 t1 p1"),
        "critic_infer": ("node 0 gpus 2-3", "d2 t1 p1"),
        "actor_train": ("node 0 gpus 0-1", "d1 t2 p1"),
        "critic_train": ("node 0 gpus 2-3", "d1 t2 p1"),
    })  # fmt: skip
    save_plan(plan, tmp_path / "plan.json")
    return plan


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_show_prints_or_writes_a_page(plan: ExecutionPlan, tmp_path: Path) -> None:
    assert "actor_generate" in run("show", tmp_path / "plan.json")
    run("show", tmp_path / "plan.json", "--html", tmp_path / "plan.html")
    assert "actor_generate, iteration 1" in (tmp_path / "plan.html").read_text()


def test_a_measured_timeline_stands_beside_the_predicted_one(plan: ExecutionPlan, tmp_path: Path) -> None:
    timeline = cost_plan(plan).timeline
    slower = [replace(s, start_s=2 * s.start_s, end_s=2 * s.end_s) for s in timeline.spans]
    run_of = replace(timeline, source="measured", period_s=2 * timeline.period_s, spans=tuple(slower))
    run_of.save(tmp_path / "timeline.json")
    text = run("show", tmp_path / "plan.json", "--timeline", tmp_path / "timeline.json")
    assert "-50.0%" in next(line for line in text.splitlines() if line.startswith("iteration"))
    run("show", tmp_path / "plan.json", "--timeline", tmp_path / "timeline.json", "--html", tmp_path / "both.html")
    html = (tmp_path / "both.html").read_text()
    assert "per iteration, measured" in html and "per iteration, predicted" in html
    run("trace", tmp_path / "timeline.json", "-o", tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["otherData"]["source"] == "measured"
    larger = replace(timeline, spans=(replace(timeline.spans[0], ranks=(7,)),))
    larger.save(tmp_path / "large.json")
    with pytest.raises(PlanError, match="rank 7"):
        run("trace", tmp_path / "plan.json", "--timeline", tmp_path / "large.json")


def test_trace_of_a_plan_lies_beside_it(plan: ExecutionPlan, tmp_path: Path) -> None:
    run("trace", tmp_path / "plan.json")
    events = json.loads((tmp_path / "plan.trace.json").read_text())["traceEvents"]
    assert {e["tid"] for e in events if e["ph"] == "X"} == {0, 1, 2, 3}


def test_a_timeline_without_its_plan_is_refused(plan: ExecutionPlan, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    cost_plan(plan).timeline.save(tmp_path / "alone" / "timeline.json")
    with pytest.raises(PlanError, match="no plan beside"):
        run("trace", tmp_path / "alone" / "timeline.json")


def test_diff_names_every_change_and_its_effect(plan: ExecutionPlan, tmp_path: Path) -> None:
    calls = list(plan.calls)
    generate = calls[0]
    calls[0] = replace(generate, strategy=replace(generate.strategy, dp=1, tp=2))
    calls[1], calls[2] = calls[2], calls[1]
    save_plan(replace(plan, calls=tuple(calls)), tmp_path / "other.json")
    a, b = tmp_path / "plan.json", tmp_path / "other.json"
    found = json.loads(run("diff", a, b, "--json"))
    changed = {(c["call"], c["field"]): (c["before"], c["after"]) for c in found["changes"]}
    assert changed == {
        ("actor_generate", "strategy"): ("d2 t1 p1", "d1 t2 p1"),
        ("", "order"): (
            "actor_generate, ref_infer, critic_infer, actor_train, critic_train",
            "actor_generate, critic_infer, ref_infer, actor_train, critic_train",
        ),
    }
    effect = next(e for e in found["effects"] if e["call"] == "actor_generate")
    assert effect["seconds"][0] == pytest.approx(cost_plan(plan).durations.seconds["actor_generate"])
    text = run("diff", a, b)
    assert "reallocate actor@actor_generate" in text  # no longer needed
    assert max(len(line) for line in text.splitlines()) <= 100
    assert run("diff", a, a).strip() == "the plans are the same"


def test_compare_prints_json_for_programs(plan: ExecutionPlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    answer = json.loads(run("compare", path, path, "--json"))
    assert [row["ratio"] for row in answer["plans"]] == [1.0, 1.0]
    run("compare", path, path, "--html", tmp_path / "compare.html")
    assert (tmp_path / "compare.html").read_text().count('class="time"') == 2


def test_a_faster_plan_is_explained_by_the_term_that_decides(plan: ExecutionPlan) -> None:
    first, other = cost_plan(plan), cost_plan(plan)
    fast = {call: {name: 0.5 * seconds for name, seconds in terms.items()} for call, terms in other.terms.items()}
    fast["actor_generate"]["decode_host"] = 0.25
    slow = {call: dict(terms) for call, terms in first.terms.items()}
    slow["actor_generate"]["decode_host"] = 1e4
    timeline = replace(other.timeline, period_s=0.5 * other.iteration_s)
    first, other = replace(first, terms=slow), replace(other, terms=fast, timeline=timeline)
    assert deciding_term(first, other) == "actor_generate: decode_host 1e+04 s, there 0.25 s"
    assert deciding_term(other, first) == ""


def test_headline_says_whose_number_is_whose() -> None:
    rows, contenders = headline_rows(Infeasible("not searched here"), ENGINE)
    words = render_headline(rows, ENGINE)
    row = next(line for line in words.splitlines() if line.startswith("deepspeed-chat"))
    assert "141.5 h" in row and f"{contenders[-1].cost.iteration_s * 1600 / 3600:.1f} h" in row
    assert "no plan" in next(line for line in words.splitlines() if line.startswith("searched plan"))
    assert "our estimate" in words and "measured by others" in words and "none of these was run" in words
    assert max(len(line) for line in words.splitlines()) <= 110
