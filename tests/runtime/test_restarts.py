"""Attempts of a run: what is started again and what is given up; checkpoints as Hugging Face folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from plan_cases import TINY, tiny_plan, tiny_run
from reward_cases import vowels
from run_cases import PATIENCE_S, ROOT, arguments, running
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from runtime.checkpoints.resume import Start
from runtime.launching.restarts import with_restarts
from runtime.processes.failures import RunFailed, Stopped
from runtime.reports.metrics import Metrics


def attempts(restarts: int, *errors: RunFailed | None, folder: Path, asked: Sequence[str] = ()) -> int:
    """How many attempts are made of a run without checkpoints whose attempts end like this."""
    ends, made = list(errors), 0

    def attempt(_: Start) -> list[Metrics]:
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
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
        )
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
