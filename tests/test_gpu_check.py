"""The check of a GPU, rehearsed on the CPU: every stage, a killed one, the report, and wheels for a machine offline."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
STAGES = ["right", "ceilings", "training", "decode", "kernels", "memory", "whole", "profile"]


def check(output: Path, *words: str, timeout: float = 900) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = ["bash", str(SCRIPTS / "gpu_check.sh"), *words, "--device", "cpu", "--tiny", "--output", str(output)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "HOME": str(output), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    return done, json.loads((output / "gpu_check.json").read_text())


def test_every_stage_is_rehearsed(tmp_path: Path) -> None:
    done, report = check(tmp_path, "--limit", "600", "--minutes", "14")
    failed = [row for stage in report["stages"].values() for row in stage["rows"] if row["verdict"] == "failed"]
    assert not failed and done.returncode == 0, f"{failed}\n{done.stderr}"
    assert list(report["stages"]) == STAGES
    assert all(stage["complete"] and stage["rows"] for stage in report["stages"].values())
    assert report["machine"]["versions"]["megatron-core"] and report["machine"]["card"]
    right = report["stages"]["right"]["rows"]
    assert not [row for row in right if row["verdict"] == "missed"]
    cases = " ".join(row["case"] for row in right)
    wanted = ("ppo fp32", "grpo fp32", "dpo fp32", "sft fp32", "sft bf16", "two ranks: tp2", "offloaded", "killed peer")
    assert not [words for words in wanted if words not in cases]
    assert len(report["stages"]["memory"]["rows"]) == 10
    assert list((tmp_path / "tables").glob("*.json"))
    assert "whole" in done.stdout and "gpu_check.json" in done.stderr


def test_a_killed_stage_leaves_table_and_report(tmp_path: Path) -> None:
    done, report = check(tmp_path, "ceilings", "--limit", "0.05")
    assert done.returncode == 1
    stage = report["stages"]["ceilings"]
    assert not stage["complete"] and "its time limit" in stage["rows"][-1]["note"]
    assert "killed after" in done.stdout.replace("\n", " ")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.mark.usefixtures("scripts")
def test_a_case_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    rows, setting = import_module("gpu_check.rows"), import_module("gpu_check.setting")

    def broken(_: object) -> Any:
        yield rows.judged("half", 1.0, "", least=0.5)
        raise ValueError("no\nluck")

    def absent(_: object) -> Any:
        raise rows.Skip("not here")

    here = setting.Setting(kind="cpu", tiny=True, backend="gloo", output=tmp_path)
    cases = [rows.Case("a", broken), rows.Case("b", absent), rows.Case("c", lambda _: [rows.Row(case="c", value=2.0)])]
    found = [(row.case, row.verdict, row.note) for row in rows.run_cases(cases, here)]
    assert found == [
        ("half", "met", ""),
        ("a", "failed", "ValueError: no luck"),
        ("b", "skipped", "not here"),
        ("c", "shown", ""),
    ]


@pytest.mark.usefixtures("scripts")
def test_a_record_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    rows = import_module("gpu_check.rows")
    path = tmp_path / "stage.jsonl"
    rows.append_row(path, rows.judged("x", 2.0, "s", most=1.0))
    path.write_text(path.read_text() + '{"row": {"case": "y"')
    assert [record["row"]["verdict"] for record in rows.read_records(path)] == ["missed"]


@pytest.mark.usefixtures("scripts")
def test_idle_time_is_what_no_kernel_covers() -> None:
    idle_share = import_module("gpu_check.gaps").idle_share
    assert idle_share([(0, 4), (1, 3), (6, 8), (8, 10)]) == pytest.approx(0.2)
    assert idle_share([]) == 0.0


@pytest.mark.usefixtures("scripts")
def test_model_flops_of_a_step() -> None:
    from plans.library import load_model

    spec = load_model("llama-7b")
    flops = import_module("gpu_check.training").step_flops(spec, [[4096]])
    # PaLM's appendix B counts 6 N + 12 L H Q T per token, twice the causal half of the attention.
    matrices = spec.params - spec.vocab * spec.hidden
    palm = 4096 * (6 * matrices + 12 * spec.layers * spec.heads * spec.head_dim * 4096)
    assert flops == pytest.approx(palm - 4096 * 6 * spec.layers * spec.hidden * 4096)


@pytest.mark.usefixtures("scripts")
def test_the_wheels_fill_an_empty_environment(tmp_path: Path) -> None:
    python = shutil.which("python3.12")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip("no Python 3.12 is at hand")
    wheels, environment = tmp_path / "wheels", tmp_path / "environment"
    filled = subprocess.run(
        [python, str(SCRIPTS / "gpu_packages.py"), "download", "--wheels", str(wheels)], capture_output=True
    )
    if filled.returncode:
        pytest.skip("no package index is at hand")
    assert sum(wheel.stat().st_size for wheel in wheels.glob("*.whl")) < 60e6
    subprocess.run([python, "-m", "venv", str(environment)], check=True)
    empty, site = environment / "bin" / "python", tmp_path / "site"
    words = ["install", "--wheels", str(wheels), "--target", str(site)]
    subprocess.run([str(empty), str(SCRIPTS / "gpu_packages.py"), *words], check=True)
    packages = import_module("gpu_packages")
    assert packages.unmet(site) == []
    code = "import pydantic, yaml, networkx, rich, safetensors, tokenizers, plans.runfile, plans.program"
    path = {"PYTHONPATH": f"{site}:{SCRIPTS.parent}"}
    subprocess.run([str(empty), "-c", code], check=True, env=path)
