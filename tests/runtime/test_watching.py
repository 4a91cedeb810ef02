"""Trackers get what `metrics.jsonl` gets, and may fail; a run that stands still is told early, with every rank."""

from __future__ import annotations

import json
import sys
import time
import types
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plan_cases import tiny_plan, tiny_run
from ranks import run_ranks

from plans.errors import RealplanError
from plans.plan import Estimate, ExecutionPlan
from runtime.batches import transfer
from runtime.executor import Executor
from runtime.reports.drift import Drift
from runtime.reports.operations import tell_operations
from runtime.reports.records import NewLines, Recorder, read_status, status_path
from runtime.reports.trackers import Trackers, check_trackers
from runtime.reports.watchdog import Watchdog

METRICS = {"iteration": 3, "critic/score/mean": 0.5, "actor/kl_loss": float("nan")}


class Calls(list[tuple[Any, ...]]):
    """What the packages were asked, with the words of tensorboard 2.20, wandb 0.22 and mlflow 3."""

    def modules(self) -> dict[str, types.ModuleType]:
        writer = types.SimpleNamespace(
            add_scalar=lambda tag, data, step: self.append(("tensorboard", tag, data, step)),
            flush=lambda: None,
            close=lambda: self.append(("tensorboard", "close")),
        )
        run = types.SimpleNamespace(
            log=lambda data, step: self.append(("wandb", data, step)), finish=lambda: self.append(("wandb", "close"))
        )
        tensorboard, summary = types.ModuleType("tensorboard"), types.ModuleType("tensorboard.summary")
        summary.Writer = lambda folder: self.append(("tensorboard", folder)) or writer  # type: ignore[attr-defined]
        wandb, mlflow = types.ModuleType("wandb"), types.ModuleType("mlflow")
        wandb.init = lambda name, dir, config: self.append(("wandb", name, config["seed"])) or run  # type: ignore[attr-defined]
        started = types.SimpleNamespace(info=types.SimpleNamespace(run_id="7"))
        mlflow.start_run = lambda run_name: self.append(("mlflow", run_name)) or started  # type: ignore[attr-defined]
        mlflow.log_dict = lambda data, place: self.append(("mlflow", data["calls"]["actor_train"]))  # type: ignore[attr-defined]
        mlflow.log_metrics = lambda found, step, run_id: self.append(("mlflow", found, step, run_id))  # type: ignore[attr-defined]
        mlflow.end_run = lambda: self.append(("mlflow", "close"))  # type: ignore[attr-defined]
        return {"tensorboard": tensorboard, "tensorboard.summary": summary, "wandb": wandb, "mlflow": mlflow}


@pytest.fixture
def plan() -> ExecutionPlan:
    return tiny_plan(2, "d2 t1 p1")


def test_trackers_get_the_finite_numbers(plan: ExecutionPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    for name, module in calls.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    trackers = Trackers(plan, tiny_run(tmp_path / "out", seed=11, trackers=["tensorboard", "wandb", "mlflow"]))
    trackers.log(3, METRICS)
    trackers.log(4, {"iteration": 4, "val/score/mean": 0.25, "scores": [1, 2]})
    trackers.close()
    assert calls == [
        ("tensorboard", str(tmp_path / "out" / "tensorboard")),
        ("wandb", "out", 11),
        ("mlflow", "out"),
        ("mlflow", "node 0, d2 t1 p1"),
        ("tensorboard", "critic/score/mean", 0.5, 3),
        ("wandb", {"critic/score/mean": 0.5}, 3),
        ("mlflow", {"critic/score/mean": 0.5}, 3, "7"),
        ("tensorboard", "val/score/mean", 0.25, 4),
        ("wandb", {"val/score/mean": 0.25}, 4),
        ("mlflow", {"val/score/mean": 0.25}, 4, "7"),
        ("tensorboard", "close"),
        ("wandb", "close"),
        ("mlflow", "close"),
    ]


def test_a_tracker_that_fails_is_left_out(
    plan: ExecutionPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = Calls()
    modules = calls.modules()

    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    modules["mlflow"].log_metrics = fails  # type: ignore[attr-defined]
    modules["tensorboard.summary"].Writer = fails  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    trackers = Trackers(plan, tiny_run(tmp_path, trackers=["tensorboard", "wandb", "mlflow"]))
    for iteration in (0, 1):
        trackers.log(iteration, METRICS)
    trackers.close()
    assert [call[0] for call in calls].count("wandb") == 4 and ("mlflow", "close") not in calls
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"{name} is left out from here on: ConnectionError: no route to host" for name in ("tensorboard", "mlflow")
    ]


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RealplanError, match="trackers names wandb, which is not installed") as error:
        check_trackers(tiny_run(tmp_path, trackers=["wandb"]))
    assert error.value.hint == "pip install wandb"


def test_a_run_that_stands_still_is_told_once_with_every_rank(tmp_path: Path) -> None:
    for rank in (0, 1):
        Recorder(tmp_path, rank, 0.0)
    places = {0: ("actor_train", 1000.0, False), 1: ("ref_infer", 1090.0, False)}

    def say() -> None:
        for rank, (step, since_s, done) in places.items():
            status = {"pid": 1, "step": step, "iteration": 4, "since_s": since_s, "done": done}
            operation = {} if rank else {"operation": "all_reduce"}
            status_path(tmp_path, rank).write_text(json.dumps(status | operation))

    say()
    watchdog = Watchdog(tmp_path, 3, patience_s=200.0)
    assert watchdog.look(1099.0) == []
    assert watchdog.look(1101.0) == [
        "no progress for 101 s of timeout_s = 200 s; a rank hangs, or is slow:",
        "  rank 0: in iteration 4, step `actor_train`, in `all_reduce` for 101 s",
        "  rank 1: in iteration 4, step `ref_infer` for 11 s",
    ]
    assert watchdog.look(1150.0) == []  # the same step of the same rank
    assert watchdog.look(1191.0)[0].startswith("no progress for 191 s")  # the other rank
    places |= {0: ("critic_train", 1300.0, False), 1: ("export", 1000.0, True)}
    say()
    assert watchdog.look(1399.0) == [] and len(watchdog.look(1401.0)) == 3


def test_the_operation_that_a_rank_waits_in_is_named(tmp_path: Path) -> None:
    """While it waits, by its status, and when the wait has ended in an error; once for a collective, once for a message
    that was asked for before."""
    plan = tiny_plan(2, "d2 t1 p1")
    job = types.SimpleNamespace(plan=plan, run=tiny_run(tmp_path / "out", timeout_s=5))

    def told(recorder: Recorder, step: str) -> str:
        """What the first rank's status tells once the second one has seen it, which then goes on."""
        if dist.get_rank() == 0:
            return ""
        status = None
        while status is None or status.step != step or not status.operation:
            time.sleep(0.02)
            status = read_status(tmp_path, 0)
        return status.line(0, status.since_s)

    def work() -> list[str]:
        recorder = Recorder(tmp_path, dist.get_rank(), 0.0)
        recorder.say("actor_train", 4)
        tell_operations(recorder, 0.5)
        found = [told(recorder, "actor_train")]
        dist.all_reduce(torch.zeros(1))
        recorder.say("ref_infer", 4)
        found.append(told(recorder, "ref_infer"))
        if dist.get_rank() == 0:
            transfer._wait(dist.irecv(torch.zeros(1), 1), 1)
        else:
            dist.send(torch.zeros(1), 0)
        one, other = (dist.new_group(timeout=timedelta(seconds=0.2)) for _ in range(2))
        executor = types.SimpleNamespace(_rank=0, _job=job)
        for wait in (
            lambda: dist.all_reduce(torch.zeros(1), group=one),
            lambda: transfer._wait(dist.irecv(torch.zeros(1), 1, group=other), 1),
        ):
            if dist.get_rank() == 0:
                with pytest.raises(RuntimeError) as late:
                    wait()
                found.append(Executor._explain(executor, late.value, "actor_train", (0, 1), 4).message)  # type: ignore[arg-type]
        dist.barrier()
        return found

    first, second = run_ranks(2, work)
    assert second == [
        "rank 0: in iteration 4, step `actor_train`, in `all_reduce` for 0 s",
        "rank 0: in iteration 4, step `ref_infer`, in `wait` for 0 s",
    ]
    where, limit = "rank 0, iteration 4, step `actor_train`", "for longer than timeout_s = 5 s"
    assert first[2:] == [
        f"{where}: waited in `all_reduce` for ranks 0-1 {limit}",
        f"{where}: waited in `wait` for rank 1 {limit}",
    ]


def test_a_plan_that_does_not_fit_is_told_once(plan: ExecutionPlan) -> None:
    estimate = Estimate(
        iteration_s=10.0, latency_s=10.0, calls_s={"actor_generate": 4.0, "actor_train": 6.0}, peak_gib=1.0,
        peak_at="actor_train", host_gib=1.0, engine="megatron", of="",
    )  # fmt: skip

    def said(step_s: float, generate_s: float, train_s: float, count: int = 12) -> list[tuple[int, str]]:
        drift = Drift(replace(plan, estimate=estimate))
        line = {
            "timing_s/step": step_s, "plan/actor_generate/measured_s": generate_s,
            "plan/actor_train/measured_s": train_s,
        }  # fmt: skip
        first = {"timing_s/step": 100.0}  # an iteration that warms up says nothing
        return [(i, words) for i in range(count) if (words := drift.add(line if i else first))]

    assert said(12.0, 4.5, 7.5) == [] and said(8.0, 3.0, 5.0) == []
    ((at, words),) = said(20.0, 12.0, 8.0)
    assert (
        at == 5 and "predicts 10 s an iteration, the last 5 took 20 s (actor_generate 3 x, actor_train 1.3 x)" in words
    )
    ((_, words),) = said(5.0, 1.0, 5.0)
    assert "took 5 s (actor_generate 0.25 x)" in words
    assert [Drift(plan).add({"timing_s/step": 9.0}) for _ in range(9)] == [""] * 9  # a plan without an estimate


def test_lines_are_read_once_and_whole(tmp_path: Path) -> None:
    lines = NewLines(tmp_path / "x.jsonl")
    assert lines.read() == []
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a"')
    assert lines.read() == [{"a": 1}] and lines.read() == []
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    assert lines.read() == [{"a": 2}]
    (tmp_path / "x.jsonl").write_text('{"a": 3}\n')
    assert lines.read() == [{"a": 3}]
