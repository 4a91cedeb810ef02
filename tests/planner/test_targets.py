"""Where commands write is tested before they work, and a full disk is one message that leaves nothing behind."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plan_cases import TINY, tiny_plan

import planner.cli.commands.check as check_module
import planner.cli.commands.compare as compare_module
import planner.cli.commands.headline as headline_module
import planner.cli.commands.search as search_module
import planner.cli.commands.show as show_module
import profiler.command as profile_module
from planner.cli import main
from plans.codec import dump_plan, load_plan, save_plan
from plans.files import OutputError
from plans.huggingface import spec_from_folder
from plans.layout import model_units
from plans.program import compile_program
from runtime.processes.failures import find_cause, write_failure
from runtime.reports.metrics import MetricsLog
from runtime.reports.records import Record, Recorder
from runtime.reports.stats import Stat
from runtime.weights.hf_folder import write_folder

PLAN = tiny_plan(1, "d1 t1 p1")
PAGE = 4096


@pytest.mark.parametrize(
    ("words", "module", "work"),
    [
        ("search --model llama-7b -o {}", search_module, "build_space"),
        ("show plan.json --html {}", show_module, "cost_plan"),
        ("trace plan.json -o {}", show_module, "cost_plan"),
        ("compare plan.json --html {}", compare_module, "cost_plan"),
        ("headline --seconds 1 --html {}", headline_module, "SearchProgress"),
        ("profile --model llama-7b --device cpu -o {}", profile_module, "profile"),
        ("check --write {}", check_module, "cost_plan"),
    ],
)
def test_targets_are_tested_before_the_work(
    words: str,
    module: object,
    work: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, work, fails)
    save_plan(PLAN, Path("plan.json"))
    Path("folder").mkdir()
    for target in ("folder", "plan.json/x", "n" * 300, "/dev/loop-control/x"):
        monkeypatch.setattr(sys, "argv", ["realplan", *words.format(target).split()])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert ended.value.code in (1, 2) and "cannot write" in said and "hint: " in said, said
    assert sorted(os.listdir(tmp_path)) == ["folder", "plan.json"]


def test_a_full_disk_keeps_the_old_plan_and_no_part_of_the_new_one(small_disk: Callable[[int], Path]) -> None:
    place = small_disk(2 * PAGE)
    save_plan(PLAN, place / "plan.json")
    (place / "fill").write_bytes(bytes(PAGE))
    with pytest.raises(OutputError, match=r"`.*plan\.json`: No space left on device\nhint: free some space there"):
        save_plan(PLAN, place / "plan.json")
    assert sorted(os.listdir(place)) == ["fill", "plan.json"] and load_plan(place / "plan.json") == PLAN


def test_a_full_disk_under_metrics_leaves_whole_lines(small_disk: Callable[[int], Path]) -> None:
    log = MetricsLog(compile_program(PLAN), small_disk(2 * PAGE) / "metrics.jsonl")
    memory = {"memory/device_gb": Stat.one(1.0), "memory/host_gb": Stat.one(1.0)}
    with pytest.raises(OutputError, match=r"metrics\.jsonl`: No space left"):
        for i in range(1000):
            log.add([Record(0, i, (("actor_generate", "call", 0.0, 1.0),), memory)])
    text = (log._path).read_text()
    assert text.count("\n") > 5 and text.endswith("\n")


def test_a_rank_has_room_for_its_last_word(small_disk: Callable[[int], Path]) -> None:
    place = small_disk(32 * PAGE)
    recorder = Recorder(place / "ranks", 0, time.time())
    with pytest.raises(OutputError, match=r"records-0\.jsonl`: No space left") as raised:
        for i in range(10**6):
            recorder.finish(i)
    write_failure(place / "ranks", 0, raised.value)
    cause = find_cause(place / "ranks", {0: 1})
    assert "No space left on device" in cause.message and cause.hint.startswith("free some space")


def test_a_full_disk_under_an_export_leaves_no_part(small_disk: Callable[[int], Path]) -> None:
    place, spec = small_disk(16 * PAGE), spec_from_folder(TINY)
    parameters = [(p, torch.zeros(p.shape)) for unit in model_units(spec) for p in unit.parameters]
    with pytest.raises(OutputError, match=r"`.*actor`: No space left on device\nhint: free some space there"):
        write_folder(spec, torch.float32, parameters, place / "actor")
    assert os.listdir(place) == []


def test_a_pipe_that_nobody_writes_to_is_no_timeline(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "plan.json").write_text(dump_plan(PLAN))
    assert not show_module._is_timeline(tmp_path / "pipe")
