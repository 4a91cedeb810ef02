"""Planning again with what a run has measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from plan_cases import tiny_plan
from typer.testing import CliRunner

from cost_models.engines.engine import MEGATRON
from cost_models.estimate import cost_plan
from planner.cli.app import app
from planner.measured import ran
from planner.space.kept import kept_limits
from plans.codec import load_plan, save_plan
from plans.errors import RealplanError, SpecError
from plans.plan import ExecutionPlan
from plans.runfile import RunFile
from runtime.launching.replan import replanned
from runtime.reports.endings import RunFailed

PLACES = {
    "actor_generate": ("node 0", "d2 t1 p1"),
    "ref_infer": ("node 0 gpu 0", "d1 t1 p1"),
    "critic_infer": ("node 0 gpu 1", "d1 t1 p1"),
    "actor_train": ("node 0 gpu 0", "d1 t1 p1"),
    "critic_train": ("node 0 gpu 1", "d1 t1 p1"),
}
TIMES = {"actor_generate": 2.0, "ref_infer": 0.25, "critic_infer": 0.5, "actor_train": 1.0, "critic_train": 4.0}
REWARD_S = 0.5


def output_of(folder: Path, plan: ExecutionPlan, times: Mapping[str, float]) -> Path:
    """The output of a run whose first iteration is slow, with responses of 2 to 6 tokens."""
    folder.mkdir(parents=True)
    cost = cost_plan(plan, MEGATRON)
    save_plan(plan.with_estimate(cost.estimate), folder / "plan.json")
    lines = []
    for warm in (9.0, 1.0, 1.0, 1.0):
        line = {f"plan/{call}/measured_s": seconds * warm for call, seconds in times.items()}
        lengths = {"response_length/p0": 2.0, "response_length/p50": 4.0, "response_length/p100": 6.0}
        lines.append(line | lengths | {"timing_s/step": 7.0 * warm})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_costs_of_the_plan_that_ran_are_what_it_took(tmp_path: Path) -> None:
    found = ran(output_of(tmp_path / "out", tiny_plan(2, PLACES), {**TIMES, "reward": REWARD_S}), MEGATRON)
    seconds = cost_plan(found.plan, found.engine).durations.seconds
    assert {name: seconds[name] for name in TIMES} == pytest.approx(TIMES)
    # The reward is a function: 8 samples over two ranks are 4 a rank.
    assert seconds["reward"] == pytest.approx(REWARD_S)
    assert found.plan.workload.graph.call("reward").seconds_per_sample == pytest.approx(REWARD_S / 4)
    assert found.plan.workload.responses.mean == pytest.approx(4.0, abs=0.5)
    # Generation, then the longer of both sides, one after the other on its GPU; moves of this small model are short.
    assert found.priced_s == pytest.approx(2.0 + 0.5 + 4.0, rel=0.1)
    assert found.run.iteration_s == 7.0


def test_a_layout_costs_as_much_more_as_the_one_that_ran(tmp_path: Path) -> None:
    plan = tiny_plan(2, PLACES)
    found = ran(output_of(tmp_path / "out", plan, TIMES), MEGATRON)
    other = replace(found.plan, calls=tiny_plan(2, "d1 t2 p1").calls)
    plain, calibrated = (cost_plan(other, engine).durations.seconds for engine in (MEGATRON, found.engine))
    was = cost_plan(found.plan, MEGATRON).durations.seconds
    for call, took in TIMES.items():
        assert calibrated[call] / plain[call] == pytest.approx(took / was[call])


def test_search_says_what_another_plan_would_gain(tmp_path: Path) -> None:
    # The critic takes 4.5 of 6.5 s on a GPU of its own, while the other one waits for 3 s of them.
    folder = output_of(tmp_path / "out", tiny_plan(2, PLACES), TIMES)
    plan = tmp_path / "new.json"
    done = CliRunner().invoke(
        app, ["search", "--measured", str(folder), "--seconds", "2", "--json", "-o", str(plan)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["ran_s"] == pytest.approx(6.5, rel=0.1) and said["measured_s"] == 7.0
    new = load_plan(plan)
    assert said["iteration_s"] < 0.8 * said["ran_s"]
    assert cost_plan(new, ran(folder, MEGATRON).engine).iteration_s == pytest.approx(said["iteration_s"])
    assert new.estimate is not None and new.estimate.engine == f"megatron@{folder}"
    checked = CliRunner().invoke(app, ["check", str(plan), "--engine", f"megatron@{folder}", "--json"])
    assert checked.exit_code == 0, checked.output
    shown = CliRunner().invoke(app, ["search", "--measured", str(folder), "--gpus", "1", "-o", str(plan)])
    assert shown.exit_code == 0 and load_plan(plan).cluster.size == 1
    assert "critic_train" in shown.output and "by these costs (it measured 7 s)" in shown.output.replace("\n", " ")


def test_what_is_no_run_and_what_says_too_much(tmp_path: Path) -> None:
    with pytest.raises(RealplanError, match="is no output of a run"):
        ran(tmp_path, MEGATRON)
    folder = output_of(tmp_path / "out", tiny_plan(2, PLACES), TIMES)
    done = CliRunner().invoke(app, ["search", "--measured", str(folder), "--batch-size", "4"])
    assert done.exit_code == 1 and "--measured" in str(done.exception) and "--batch-size" in str(done.exception)
    (folder / "metrics.jsonl").write_text("{}\n{")
    with pytest.raises(RealplanError, match=r"metrics\.jsonl:2"):
        ran(folder, MEGATRON)
    (folder / "metrics.jsonl").unlink()
    assert ran(folder, MEGATRON).engine.factors == ()


def test_limits_of_an_earlier_search_are_kept_as_far_as_there_are_devices(tmp_path: Path) -> None:
    """Of a plan for two nodes of two: what one node can still meet is kept, under the name that it has there."""
    plan, calls = tiny_plan(2, PLACES), list(PLACES)
    given = [
        "--pin actor_train.gpus=2", "--pin critic_train.tp=4", "--pin ref_infer.mesh=node 1",
        "--pin critic_infer.mesh=node 0 gpus 0-1", "--pin actor_generate.recompute=none",
        "--forbid *.pp>1", "--same-mesh actor_train,critic_train", "--max-memory 20GiB",
    ]  # fmt: skip
    plan = replace(plan, provenance={"search": {"limits": given}})
    kept, dropped = kept_limits(tmp_path, plan, calls, plan.cluster)
    assert dropped == ["--pin critic_train.tp=4", "--pin ref_infer.mesh=node 1"]
    assert kept.words == [words for words in given if words not in dropped]
    assert {rule.value for rule in kept.pins if rule.field == "mesh"} == {"node 0"}
    with pytest.raises(SpecError, match="`--output x` is no limit"):
        kept_limits(tmp_path, replace(plan, provenance={"search": {"limits": ["--output x"]}}), calls, plan.cluster)


def test_a_plan_for_what_is_left_keeps_the_limits_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of two devices is left: a pin on both goes, other rules stay, and a bound on memory that nothing meets is
    said and not dropped. The other plan of these calls on one device recomputes nothing."""
    monkeypatch.setattr("runtime.launching.replan.SEARCH_S", 1)
    kept = ["--pin actor_train.recompute=full", "--max-memory 20GiB"]
    plan = replace(tiny_plan(2, PLACES), provenance={"search": {"limits": ["--pin actor_generate.dp=2", *kept]}})
    run = RunFile(output=str(output_of(tmp_path / "out", plan, TIMES)))
    found = replanned(plan, run, 1)
    assert found.limits == kept and found.planned("actor_train").strategy.recompute == "full"
    assert "planned without --pin actor_generate.dp=2" in capsys.readouterr().err
    tight = replace(plan, provenance={"search": {"limits": ["--max-memory 0.001GiB"]}})
    with pytest.raises(RunFailed, match=r"no plan for the 1 devices that are left within --max-memory 0.001GiB"):
        replanned(tight, run, 1)
