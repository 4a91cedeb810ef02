"""What `realrun` says when something is wrong: one message that names the place, a non-zero exit, within seconds."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plan_cases import CRITIC_FREE, REWARDS, TINY, tiny_plan
from run_cases import PATIENCE_S, PLAN, arguments, fails, outcome, running

from plans.errors import RealplanError
from plans.huggingface import spec_from_folder
from plans.library import load_cluster
from plans.model import Head, Position
from plans.plan import Estimate
from plans.timeline import load_timeline
from runtime.launching import preflight
from runtime.launching.slurm import first_host, rank_variables
from runtime.models.support import check_supported


def test_no_weights(tmp_path: Path) -> None:
    said = fails(arguments(tmp_path, weights=""))
    assert "no weights for `actor`" in said and "weights=random" in said


def test_weights_of_another_model(tmp_path: Path) -> None:
    spec = replace(spec_from_folder(TINY), ffn=256)
    models = {"actor": spec, "ref": spec, "critic": spec.with_value_head()}
    said = fails(arguments(tmp_path, plan=replace(PLAN, workload=replace(PLAN.workload, models=models))))
    assert "do not fit `actor`: ffn is 352 there and 256 in the plan" in said


def test_an_algorithm_that_is_not_trained(tmp_path: Path) -> None:
    plan = tiny_plan(1, "d1 t1 p1", algorithm="rloo", order=CRITIC_FREE)
    plan = replace(plan, workload=replace(plan.workload, graph=replace(plan.workload.graph, name="my-own")))
    said = fails(arguments(tmp_path, plan=plan))
    assert "`actor_train` of the graph `my-own` names no loss" in said
    assert "hint: loss: one of ppo, grpo, rloo, remax, reinforce++, or file.py:function" in said
    assert not (tmp_path / "out").exists()


def test_pairs_stay_together() -> None:
    order = ("ref_infer", "actor_train")
    single = tiny_plan(1, "d1 t1 p1", algorithm="dpo", order=order)
    with pytest.raises(RealplanError, match=r"dpo has 2 responses per prompt \(chosen, rejected\).* group_size is 1"):
        check_supported(single)
    sizes = {"batch_size": 4, "group_size": 2, "minibatches": 8}
    with pytest.raises(RealplanError, match="actor_train: minibatches of 1 samples cut pairs"):
        check_supported(tiny_plan(1, "d1 t1 p1", algorithm="dpo", order=order, **sizes))


@pytest.mark.parametrize(("change", "rule", "hint"), [
    ({"group_size": 1}, "grpo compares the samples of one prompt, and the plan's group_size is 1", "2 or more"),
    ({"dtype": "fp16"}, "dtype fp16 needs loss scaling", "bf16 or fp32"),
    ({"position": Position.ALIBI}, "position encoding `alibi`", "rotary"),
    ({"activation": "relu2"}, "activation `relu2`", "silu"),
    ({"norms_per_layer": 3}, "3 norms per layer", "2 or 4"),
    ({"head": Head.VALUE}, "a value head tied to its embedding", "tied_embeddings"),
])  # fmt: skip
def test_what_cannot_run_is_refused(change: dict[str, Any], rule: str, hint: str) -> None:
    plan = tiny_plan(1, "d1 t1 p1", algorithm="grpo", order=CRITIC_FREE, batch_size=2, group_size=4)
    workload = plan.workload
    check_supported(plan)
    if change.keys() & {"group_size", "dtype"}:
        workload = replace(workload, **change)
    else:
        workload = replace(workload, models={**workload.models, "actor": replace(workload.models["actor"], **change)})
    with pytest.raises(RealplanError) as raised:
        check_supported(replace(plan, workload=workload))
    assert rule in raised.value.message and hint in raised.value.hint


SRUN = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2", "SLURM_JOB_NODELIST": "gpu[017-019,033]", "SLURM_STEP_NODELIST": "gpu[018-019]",
}  # fmt: skip


def test_ranks_of_srun() -> None:
    found = rank_variables(SRUN)
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("5", "1", "8", "gpu018")
    assert 1024 < int(found["MASTER_PORT"]) < 2**16
    assert rank_variables(SRUN | {"SLURM_PROCID": "0"})["MASTER_PORT"] == found["MASTER_PORT"]
    assert "MASTER_PORT" not in rank_variables(SRUN | {"MASTER_PORT": "29500"})
    assert rank_variables(SRUN | {"SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "127.0.0.1"
    assert rank_variables(SRUN | {"RANK": "0"}) == {}, "torchrun has said"
    batch_script = {name: value for name, value in SRUN.items() if not name.startswith("SLURM_STEP")}
    assert rank_variables(batch_script) == {}, "the script starts the ranks itself"
    assert [first_host(nodes) for nodes in ("a1", "a1,b2", "a[3,5],b2", "r[1-2]n[04-07]-ib")] == [
        "a1", "a1", "a3", "r1n04-ib",
    ]  # fmt: skip


def test_too_few_devices(tmp_path: Path) -> None:
    cluster = replace(load_cluster("local-cpu", gpus=2, gpus_per_node=2), gpu=load_cluster("h100-80gb-sxm").gpu)
    said = fails(arguments(tmp_path, plan=replace(PLAN, cluster=cluster)))
    assert "the plan needs 2 ranks, this machine has" in said and "CUDA devices" in said


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "megatron" else object())
    with pytest.raises(RealplanError, match="megatron-core") as raised:
        preflight.check_packages()
    assert raised.value.hint == "pip install 'realplan[run]'"


def test_wrong_number_of_ranks_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "the plan needs 2 ranks, WORLD_SIZE=1 of the environment says" in fails(arguments(tmp_path))


def test_restarts_are_the_launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of rank 0 says that torchrun or slurm starts a run again, and not the keys of the run file."""
    command = arguments(tmp_path, "--dry-run", restarts=3, on_loss="replan")
    assert "restarts=3" not in outcome(command).stderr
    for rank in ("0", "1"):
        for name, value in {
            "RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
        }.items():
            monkeypatch.setenv(name, value)
        done = outcome(command)
        said = [line for line in done.stderr.splitlines() if "restarts=3, on_loss=replan" in line]
        assert done.returncode == 0 and len(said) == (rank == "0"), done.stderr
        assert all("torchrun --max-restarts" in line and "--requeue" in line for line in said)


def test_stale_estimate(tmp_path: Path) -> None:
    estimate = Estimate(
        iteration_s=1, latency_s=1, calls_s={}, peak_gib=1, peak_at="", host_gib=1, engine="e", of="sha256:of-another"
    )
    said = fails(arguments(tmp_path, plan=PLAN.with_estimate(estimate)))
    assert "stale" in said and "realplan check --write" in said and "--allow-stale" in said


def test_an_illegal_plan_is_located(tmp_path: Path) -> None:
    command = arguments(tmp_path)
    file = tmp_path / "plan.json"
    file.write_text(file.read_text().replace('"node 0", "strategy": "d2 t1 p1"', '"node 0", "strategy": "d4 t1 p1"'))
    assert f"{file}:7:62: actor_generate: dp 4 = 4 but mesh `node 0` has 2 GPUs" in fails(command)


def test_wrong_use(tmp_path: Path) -> None:
    assert "key=value" in fails(arguments(tmp_path, "iterations"), code=2)
    assert "itertions" in fails(arguments(tmp_path, "itertions=3"))
    command = arguments(tmp_path)
    (tmp_path / "plan.json").unlink()
    assert "plan.json" in fails(command, code=2)


def test_dry_run_starts_nothing(tmp_path: Path) -> None:
    done = outcome(arguments(tmp_path, "--dry-run"))
    assert done.returncode == 0 and not (tmp_path / "out").exists()
    assert "batch 8 prompts x group size 1 = 8 samples" in done.stdout
    assert "rank 1" in done.stdout and "critic_train (train_step)" in done.stdout


def test_dry_run_refuses_what_a_run_would_refuse(tmp_path: Path) -> None:
    said = fails(arguments(tmp_path, "--dry-run", reward=f"{REWARDS}:with_answers"))
    assert "needs a parameter `answer`, which nothing provides" in said and not (tmp_path / "out").exists()
    said = fails(arguments(tmp_path, "--dry-run", weights=""))
    assert "no weights for `actor`" in said
    order = ("actor_generate", "reward_infer", "ref_infer", "actor_infer", "actor_train")
    judged = tiny_plan(1, "d1 t1 p1", algorithm="grpo", order=order, reward_model=True, group_size=2)
    said = fails(arguments(tmp_path, "--dry-run", plan=judged, reward=""))
    assert f"`{TINY}` has no value head" in said and "hint: a folder of a reward model" in said
    (tmp_path / "out").write_text("in the way")
    assert "it is no folder" in fails(arguments(tmp_path, "--dry-run"))


@pytest.mark.parametrize(("function", "words"), [
    ("failing", "raised ZeroDivisionError: no reward today"), ("leaving", "called exit(0)"),
])  # fmt: skip
def test_a_reward_that_fails(tmp_path: Path, function: str, words: str) -> None:
    said = fails(arguments(tmp_path, reward=f"{REWARDS}:{function}"))
    assert "iteration 0, step `reward`: reward" in said and words in said and "for sample 0: prompt '" in said
    assert "rank 0" in said or "rank 1" in said
    assert "went away" not in said


def test_a_killed_rank(tmp_path: Path) -> None:
    command = arguments(tmp_path, iterations=10000, export=False)
    with running(command, tmp_path / "out" / ".ranks", 2) as (process, status):
        os.kill(status[1].pid, signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    error = next(line for line in said.splitlines() if line.startswith("error:"))
    assert error.startswith("error: rank 1 was killed by SIGKILL in iteration ") and "step `" in error
    assert "Traceback" not in said and said.count("error:") == 1
    for rank in status:
        assert not Path(f"/proc/{rank.pid}").exists()


def test_a_killed_launcher_leaves_no_ranks(tmp_path: Path) -> None:
    command = arguments(tmp_path, iterations=10000, export=False)
    with running(command, tmp_path / "out" / ".ranks", 0) as (process, status):
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while any(_alive(s.pid) for s in status) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(_alive(s.pid) for s in status)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_run_writes_its_files(tmp_path: Path) -> None:
    estimate = Estimate(
        iteration_s=1, latency_s=1, calls_s={"ref_infer": 0.5}, peak_gib=1, peak_at="", host_gib=1, engine="e", of="x"
    )
    command = arguments(tmp_path, "--allow-stale", "iterations=2", plan=PLAN.with_estimate(estimate))
    done = outcome(command)
    assert done.returncode == 0, done.stderr
    out, said = done.stdout, done.stderr
    assert not out and "iteration 2/2  reward" in said and "reward: first quarter" in said
    folder = tmp_path / "out"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1]
    assert lines[1]["plan/ref_infer/predicted_s"] == 0.5 and lines[1]["timing_s/realloc_actor"] > 0
    timeline = load_timeline(folder / "timeline.json")
    assert {span.ranks for span in timeline.spans} == {(0,), (1,)} and timeline.source == "measured"
    assert {span.name for span in timeline.iteration(1)} >= {"actor_generate", "reward", "critic_train"}
    assert sorted(p.name for p in folder.iterdir()) == [
        "actor",
        "metrics.jsonl",
        "plan.json",
        "run.yaml",
        "samples.jsonl",
        "timeline.json",
    ]
    assert (folder / "actor" / "model.safetensors").is_file() and (folder / "actor" / "tokenizer.json").is_file()


def test_a_disk_that_fills_up_under_two_ranks_is_one_message(small_disk: Callable[[int], Path], tmp_path: Path) -> None:
    """Others fill the disk while it runs: what is left has room for what a run says, and none for the weights that it
    exports."""
    page = resource.getpagesize()
    disk = small_disk(2**26)
    output = disk / "out"
    with running(arguments(tmp_path, f"output={output}", iterations=8), output / ".ranks", iteration=1) as (process, _):
        (disk / "others").write_bytes(bytes(shutil.disk_usage(disk).free - 50 * page))
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and "Traceback" not in said, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and str(output) in errors[0] and "No space left on device" in errors[0], said
    assert said.count("hint: ") == 1 and "free some space there" in said
    left = {path.name for path in output.rglob("*")}
    assert not [name for name in left if "partial" in name or name.startswith(".")] and "actor" not in left
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 8
