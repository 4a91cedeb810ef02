"""Attempts of a run: what is started again and what is given up; checkpoints as Hugging Face folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from plan_cases import FIXTURES, REWARDS, TINY, tiny_plan, tiny_run
from reward_cases import vowels
from run_cases import PATIENCE_S, PLAN, arguments, outcome, running
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from plans.codec import is_stale, load_plan
from plans.plan import ExecutionPlan
from plans.program import compile_program
from runtime.checkpoints.folder import remove_after, stop_request
from runtime.checkpoints.resume import Start
from runtime.launching.keeping import stopped_by_signals
from runtime.launching.restarts import with_restarts
from runtime.processes.lifetime import BATCH_SIGNALS, STOP_SIGNALS, deaf_children
from runtime.reports.endings import Beyond, RunFailed, Stopped
from runtime.reports.metrics import Metrics
from runtime.reports.monitor import KL, Monitor
from runtime.reports.records import Recorder
from runtime.reports.stats import Stat


def test_a_run_goes_back_past_a_bad_batch(tmp_path: Path) -> None:
    texts = [json.loads(line)["prompt"] for line in (FIXTURES / "prompts.jsonl").read_text().splitlines()]
    with_bad = [*texts[:8], *(f"{text} !" for text in texts[8:16]), *texts[16:40]]
    keys: dict[str, Any] = {"iterations": 3, "checkpoint": {"every": 1}, "export": False}
    learnt: dict[str, list[dict[str, float]]] = {}
    for name, prompts, more in (
        ("bad", with_bad, {"on_nonfinite": "rollback", "reward": f"{REWARDS}:spoiling"}),
        ("good", [*with_bad[:8], *with_bad[16:]], {}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
        data = {"data": {"source": str(folder / "data.jsonl"), "shuffle": False}}
        command = arguments(folder, **keys | more | data)
        done = outcome(command)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
        apart = ("timing_s", "perf", "plan/", "data/")
        learnt[name] = [{k: v for k, v in line.items() if not k.startswith(apart)} for line in lines]
        if name == "bad":
            assert "vf_loss is inf" in done.stderr and "going back to iteration 1" in done.stderr, done.stderr
            assert [line.get("data/skipped_batches") for line in lines] == [None, 1.0, 1.0]
            assert yaml.safe_load((folder / "out" / "checkpoints" / "global_step_3" / "run.yaml").read_text())[
                "skip_batches"
            ] == 1  # fmt: skip
    assert learnt["bad"] == learnt["good"]


def test_how_far_and_how_often_a_run_goes_back(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, on_nonfinite="rollback", kl_bound=0.1, rollbacks=2, restarts=1, checkpoint={"every": 1})
    killed, bad = RunFailed("rank 0 was killed"), RunFailed("loss is nan", nonfinite=2)
    ends: list[RunFailed] = [bad, killed, Beyond(4, 0.2, 0.1), bad]
    begun: list[Start] = []

    def attempt(_: ExecutionPlan, start: Start) -> list[Metrics]:
        begun.append(start)
        raise ends[len(begun) - 1]

    with pytest.raises(RunFailed, match="loss is nan"):
        with_restarts(tiny_plan(1, "d1 t1 p1"), run, Start(), attempt, ())
    # Without a checkpoint yet: batches 0 to 2 of the first failure, then those up to 4 + 3 of the third are left out.
    assert [start.skip_batches for start in begun] == [0, 3, 3, 8]
    assert all(start.iteration == 0 for start in begun)


def test_a_state_beyond_the_bound_is_no_checkpoint(tmp_path: Path) -> None:
    plan = tiny_plan(1, "d1 t1 p1")
    recorder = Recorder(tmp_path / "ranks", 0, 0.0)
    memory = {"memory/device_gb": Stat.one(1.0), "memory/host_gb": Stat.one(1.0)}
    step = compile_program(plan).steps[0]
    for iteration, kl in enumerate((0.0, 0.02, 0.3)):
        with recorder.span(step, iteration):
            pass
        recorder.add(iteration, {**memory, KL: Stat.one(kl)})
        recorder.finish(iteration)
    with pytest.raises(Beyond, match=r"iteration 2: the mean KL to the reference is 0.3, beyond kl_bound = 0.1"):  # noqa: SIM117
        with Monitor(plan, 3, tmp_path / "ranks", tmp_path, kl_bound=0.1):
            pass
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    run = tiny_run(tmp_path, checkpoint={"every": 1})
    for number in (1, 2, 3):
        (run.checkpoint_folder / f"global_step_{number}").mkdir(parents=True)
    remove_after(run, 1)
    assert [path.name for path in run.checkpoint_folder.iterdir()] == ["global_step_1"]


def test_a_run_goes_on_with_the_devices_that_are_left(tmp_path: Path) -> None:
    """Both ranks train, one is killed after a checkpoint, and its device is gone: one rank does the rest."""
    command = arguments(tmp_path, iterations=4, checkpoint={"every": 1}, restarts=2, on_loss="replan")
    command[2] = (
        "import runtime.launching.replan, runtime.launching.restarts as r; r.with_restarts.__defaults__ = "
        "(lambda plan: 1,); runtime.launching.replan.SEARCH_S = 1; " + command[2]
    )
    with running(command, tmp_path / "out" / ".ranks", iteration=2) as (process, ranks):
        os.kill(ranks[1].pid, signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0 and "Traceback" not in said, said
    assert "1 of 2 devices are left" in said and "going on with a plan for 1 devices" in said
    plan = load_plan(tmp_path / "out" / "plan.json")
    assert plan.cluster.size == 1 and not is_stale(plan) and plan.workload == PLAN.workload
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    assert sum("plan/peak/rank_1_gib" in line for line in lines) in (1, 2)  # those of two ranks, up to the checkpoint


def test_what_is_left_is_planned_for_only_where_that_is_asked(tmp_path: Path) -> None:
    def attempt(_: ExecutionPlan, __: Start) -> list[Metrics]:
        raise RunFailed("rank 1 was killed by SIGKILL")

    run = tiny_run(tmp_path, restarts=3)
    with pytest.raises(RunFailed, match="1 of 2 devices are left") as stopped:
        with_restarts(PLAN, run, Start(), attempt, (), left=lambda _: 1)
    assert "on_loss=replan" in stopped.value.hint
    with pytest.raises(RunFailed, match=r"no plan for the 1 devices that are left: .*is no output of a run"):
        with_restarts(PLAN, run.model_copy(update={"on_loss": "replan"}), Start(), attempt, (), left=lambda _: 1)


def attempts(restarts: int, *errors: RunFailed | None, folder: Path, asked: Sequence[str] = ()) -> int:
    """How many attempts are made of a run without checkpoints whose attempts end like this."""
    ends, made = list(errors), 0

    def attempt(_: ExecutionPlan, __: Start) -> list[Metrics]:
        nonlocal made
        error = ends[made]
        made += 1
        if error is not None:
            raise error
        return []

    run = tiny_run(folder, restarts=restarts)
    try:
        with_restarts(tiny_plan(1, "d1 t1 p1"), run, Start(), attempt, asked)
    except RunFailed as error:
        assert error is ends[made - 1]
    return made


def test_what_is_started_again(tmp_path: Path) -> None:
    one, other = RunFailed("rank 0 was killed"), RunFailed("rank 1 was killed")
    assert attempts(3, None, folder=tmp_path) == 1
    assert attempts(3, one, None, folder=tmp_path) == 2
    assert attempts(3, one, other, None, folder=tmp_path) == 3
    assert attempts(1, one, other, folder=tmp_path) == 2
    assert attempts(0, one, folder=tmp_path) == 1
    assert attempts(5, one, one, folder=tmp_path) == 2  # the same words at the same point: no accident
    assert attempts(5, Stopped("stopped by SIGTERM"), folder=tmp_path) == 1
    assert attempts(5, one, folder=tmp_path, asked=["SIGTERM"]) == 1


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signals_that_ask_for_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    """The first one; the second one ends the run at once."""
    run = tiny_run(tmp_path, checkpoint={"every": 1})
    with stopped_by_signals(run, tmp_path) as asked:
        signal.raise_signal(number)
        assert asked == [number.name] and stop_request(tmp_path).exists()
        with pytest.raises(Stopped, match=f"stopped by {number.name}"):
            signal.raise_signal(number)


def test_a_process_that_starts_hears_signals_when_it_says_so() -> None:
    for number in BATCH_SIGNALS:
        code = "import runtime.processes.lifetime as l; print(flush=True); input(); l.hear(); print('deaf')"
        with deaf_children():
            started = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True)
        started.send_signal(number)
        assert started.stdout is not None and started.stdout.readline() == "\n"
        out, _ = started.communicate("\n", timeout=PATIENCE_S)
        assert started.returncode == -number and not out


def test_a_killed_rank_costs_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    command = arguments(tmp_path, iterations=4, checkpoint={"every": 1}, restarts=2)
    with running(command, tmp_path / "out" / ".ranks", iteration=2) as (process, ranks):
        os.kill(ranks[1].pid, signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0 and "Traceback" not in said, said
    assert "rank 1 was killed by SIGKILL" in said and "restart 1 of 2" in said and "going on from" in said
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [(s["iteration"], s["sample"]) for s in samples] == [(i, n) for i in range(4) for n in range(4)]
    assert all(
        s["prompt"] and s["rewards"] == pytest.approx(vowels([s["prompt"]], [s["response"]])[0]) for s in samples
    )
    exported(tmp_path)


def exported(folder: Path) -> None:
    """The last checkpoint as folders: the tensors that the ranks exported at the end, and `transformers` loads them."""
    for role in ("actor", "critic"):
        code = "from runtime.cli import main; main()"
        words = ["export", str(folder / "out"), str(folder / role), "--role", role]
        done = outcome([sys.executable, "-c", code, *words])
        assert done.returncode == 0, done.stderr
    found, wanted = (load_file(place / "model.safetensors") for place in (folder / "actor", folder / "out" / "actor"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    table = AutoModelForCausalLM.from_pretrained(folder / "actor").get_input_embeddings().weight
    assert not torch.equal(table, AutoModelForCausalLM.from_pretrained(TINY).get_input_embeddings().weight)
    names = {path.name for path in (folder / "actor").iterdir()}
    assert names == {path.name for path in (folder / "out" / "actor").iterdir()}
    config = json.loads((folder / "critic" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]


def test_export_says_what_there_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from runtime.cli import export_app

    with pytest.raises(SystemExit):
        export_app([str(tmp_path), str(tmp_path / "actor")])
    said = capfd.readouterr().err
    assert f"no checkpoint in `{tmp_path}`" in said and "hint:" in said
