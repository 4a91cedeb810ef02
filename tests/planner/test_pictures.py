"""Pages and traces: what they hold, how large they are, and that a browser draws them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browsers import CHROMIUM, NO_CHROMIUM, browser, reported

from cost_models.estimate import PlanCost, cost_plan
from planner.pictures.idle import idle_by_mesh, idle_by_rank, idle_share
from planner.pictures.lanes import blocks, continued, lanes
from planner.pictures.page import Picture, Table, render_page
from planner.pictures.svg import ticks
from planner.pictures.trace import trace_json
from plans.algorithms import algorithm_graph
from plans.checks import check_plan
from plans.cluster import parse_mesh
from plans.library import load_cluster, load_model
from plans.plan import ExecutionPlan, PlannedCall
from plans.strategy import ParallelStrategy, Recompute, parse_degrees
from plans.timeline import Span, Timeline
from plans.workload import Workload

PLACES = (
    ("critic_train", "nodes 8-15", "d16 t4 p1", {"micro_batches": 4, "recompute": Recompute.FULL}, 1),
    ("actor_generate", "nodes 0-7", "d64 t1 p1", {}, 0),
    ("reward_infer", "node 8 gpus 0-3", "d4 t1 p1", {"micro_batches": 8}, 0),
    ("ref_infer", "nodes 0-7", "d32 t2 p1", {}, 0),
    ("critic_infer", "nodes 12-15", "d32 t1 p1", {}, 0),
    ("actor_train", "nodes 0-7", "d8 t4 p2", {"micro_batches": 8, "recompute": Recompute.FULL}, 0),
)


@pytest.fixture(scope="module")
def plan() -> ExecutionPlan:
    """PPO with 7B models on 16 nodes, calls on different meshes, critic training one period late."""
    cluster = load_cluster("h100-80gb-sxm", gpus=128)
    spec = load_model("llama-7b")
    value = spec.with_value_head()
    calls = []
    for call, mesh, degrees, settings, lag in PLACES:
        strategy = ParallelStrategy(**parse_degrees(degrees), **settings)
        calls.append(PlannedCall(call=call, mesh=parse_mesh(mesh, cluster), strategy=strategy, lag=lag))
    models = {"actor": spec, "ref": spec, "reward": value, "critic": value}
    workload = Workload(graph=algorithm_graph("ppo"), models=models)
    plan = ExecutionPlan(workload=workload, cluster=cluster, calls=tuple(calls))
    assert not check_plan(plan), check_plan(plan)
    return plan


@pytest.fixture(scope="module")
def cost(plan: ExecutionPlan) -> PlanCost:
    return cost_plan(plan)


@pytest.fixture(scope="module")
def page(plan: ExecutionPlan, cost: PlanCost) -> str:
    return render_page([Picture(title="a plan", plan=plan, timeline=cost.timeline, memory=cost.memory)], "A plan")


def gpus_over_time(timeline: Timeline, size: int, begin_s: float, end_s: float, steps: int) -> np.ndarray:
    """Busy or not at `steps` moments, [ranks, steps]: the independent reference for idle time."""
    moments = begin_s + (np.arange(steps) + 0.5) * (end_s - begin_s) / steps
    busy = np.zeros((size, steps), dtype=bool)
    for span in timeline.spans:
        if span.kind not in ("transfer", "release"):
            busy[list(span.ranks)] |= (moments >= span.start_s) & (moments < span.end_s)
    return busy


def test_idle_share_is_what_a_grid_of_moments_shows(plan: ExecutionPlan, cost: PlanCost) -> None:
    timeline = cost.timeline
    begin = min(s.start_s for s in timeline.spans if s.iteration == 1)
    long = replace(timeline, spans=tuple(continued(timeline, begin + 3 * timeline.period_s)))
    busy = gpus_over_time(long, 128, begin + timeline.period_s, begin + 2 * timeline.period_s, 20_000)
    np.testing.assert_allclose(idle_by_rank(timeline, plan.cluster), 1.0 - busy.mean(axis=1), atol=2e-3)
    assert idle_share(timeline, plan.cluster) == pytest.approx(1.0 - busy.mean(), abs=2e-3)
    by_mesh = idle_by_mesh(timeline, plan)
    assert by_mesh["nodes 0-7"] == pytest.approx(1.0 - busy[:64].mean(), abs=2e-3)


def test_trace_has_every_span_on_every_gpu_it_holds(plan: ExecutionPlan, cost: PlanCost) -> None:
    events = json.loads(trace_json(cost.timeline, plan))["traceEvents"]
    drawn: dict[tuple[str, int, float], set[int]] = {}
    for event in events:
        if event["ph"] == "X":
            key = (event["name"], event["args"]["iteration"], event["ts"])
            drawn.setdefault(key, set()).add(event["pid"] * 8 + event["tid"])
            assert event["dur"] == pytest.approx(event["args"]["seconds"] * 1e6, abs=1.5)
    held = [span for span in cost.timeline.spans if span.kind != "transfer"]
    expected = {(s.name, s.iteration, round(s.start_s * 1e6, 1)): set(s.ranks) for s in held}
    assert drawn == expected
    opened = [e["id"] for e in events if e["ph"] == "b"]
    assert opened and sorted(opened) == sorted(e["id"] for e in events if e["ph"] == "e")
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {f"node {i}" for i in range(16)}
    train = next(e for e in events if e["name"] == "actor_train")
    assert train["args"]["strategy"] == "d8 t4 p2" and train["args"]["mesh"] == "nodes 0-7"
    assert len({e["cname"] for e in events if e["ph"] == "X" and e["cat"] == "call"}) == 6


def test_lanes_cover_every_gpu_once_and_blocks_keep_gpu_seconds(plan: ExecutionPlan, cost: PlanCost) -> None:
    spans = [s for s in cost.timeline.spans if s.kind in ("call", "reallocate")]
    found = lanes(spans, plan.cluster)
    assert [rank for lane in found for rank in range(lane.first, lane.last + 1)] == list(range(128))
    assert len(found) < 8
    assert [lane.name(plan.cluster) for lane in found][:2] == ["nodes 0-7", "node 8 gpus 0-3"]
    area = sum(
        (b.end_s - b.start_s) * sum(lane.gpus for lane in found[b.top : b.bottom + 1]) for b in blocks(spans, found)
    )
    assert area == pytest.approx(sum(s.duration_s * len(s.ranks) for s in spans))


def test_measured_spans_of_single_ranks_share_a_lane() -> None:
    cluster = load_cluster("local-cpu", gpus=4, gpus_per_node=4)
    spans = [
        Span(name="train", kind="call", iteration=0, start_s=0.01 * r, end_s=1.0 + 0.01 * r, ranks=(r,))
        for r in range(4)
    ]
    found = lanes(spans, cluster)
    (block,) = blocks(spans, found)
    assert len(found) == 1 and (block.start_s, block.end_s) == (0.0, 1.03)


def test_page_refers_to_nothing_outside_and_is_small(page: str, plan: ExecutionPlan, cost: PlanCost) -> None:
    assert not re.search(r"https?:|src\s*=|href\s*=|@import|url\((?!#)", page)
    assert len(page) < 200_000
    text = f"{cost.iteration_s:.4g} s"
    assert text in page and f"{cost.memory.peak_gib:.1f} GiB" in page
    assert "prefers-color-scheme:dark" in page
    for planned in plan.calls:
        assert f"{planned.call}, iteration 1" in page
    assert "nodes 0-7: d8 t4 p2" in page and "8 micro-batches, recompute full" in page
    largest = next(iter(cost.memory.peak_terms))
    assert f"{largest}: " in page


def test_words_of_a_plan_are_escaped(plan: ExecutionPlan, cost: PlanCost) -> None:
    evil = "<script>alert(1)</script>"
    picture = Picture(title=evil, plan=plan, timeline=cost.timeline, memory=cost.memory, notes=(evil,))
    text = render_page([picture], evil, Table((evil,), ((evil,),)))
    assert evil not in text and "&lt;script&gt;alert(1)" in text


@pytest.mark.parametrize("until", [0.003, 0.9, 7.0, 42.0, 318.4, 5000.0])
def test_ticks_are_round_and_few(until: float) -> None:
    found = ticks(until)
    assert found[0] == 0 and found[-1] <= until * (1 + 1e-9) and 4 <= len(found) <= 10
    assert re.fullmatch(r"[125](\.?0*)?(e[+-]\d+)?", f"{found[1]:e}".replace(".000000", ""))


@pytest.mark.skipif(not CHROMIUM, reason=NO_CHROMIUM)
def test_browser_draws_every_bar_without_an_error(
    page: str, plan: ExecutionPlan, cost: PlanCost, tmp_path: Path
) -> None:
    pictures = [
        Picture(title=name, plan=plan, timeline=timeline, memory=cost.memory)
        for name, timeline in (("one", cost.timeline), ("two", replace(cost.timeline, source="measured")))
    ]
    for name, text in (("one", page), ("several", render_page(pictures, "Several"))):
        file = tmp_path / f"{name}.html"
        file.write_text(text)
        dom = browser(file, tmp_path / "profile")
        data = reported(dom)
        assert "error" not in data, data
        assert data["ready"] == "yes"
        assert int(data["bars"]) == int(data["drawn"]) == text.count('class="b ') > 30
        assert dom.count("<title>") == 1  # the script took the tooltips over
