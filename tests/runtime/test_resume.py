"""Runs that stop and go on, to the same bits or under another plan; checkpoints that are refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from plan_cases import TINY, tiny_plan, tiny_run
from ranks import run_ranks
from run_cases import PATIENCE_S, PLAN, ROOT, arguments, outcome, running
from safetensors.torch import load_file, save_file

from plans.checkpoint import Entry, parameters_of
from plans.checkpoint_files import (
    MASTER,
    Checkpoint,
    CheckpointError,
    CheckpointIndex,
    newest_usable,
    open_checkpoint,
    sealed_index,
    steps_in,
    takeover_problems,
    usable,
)
from plans.codec import save_plan
from plans.lora import Lora
from plans.plan import ExecutionPlan
from plans.program import Copy
from plans.runfile import RunFile
from plans.seals import seal_of
from runtime.checkpoints.complete import Completer
from runtime.checkpoints.course import run_iterations, take_up
from runtime.checkpoints.export import export_checkpoint
from runtime.checkpoints.folder import prepare_folder, stop_request
from runtime.checkpoints.read import CheckpointReader
from runtime.checkpoints.resume import Start, choose_start
from runtime.checkpoints.stopping import StopAgreement
from runtime.executor import Executor
from runtime.groups import GroupCache
from runtime.job import prepare_job
from runtime.models.installation import install
from runtime.models.model import named_shards
from runtime.reports.metrics import Metrics
from runtime.reports.monitor import Monitor
from runtime.reports.records import Recorder
from runtime.weights.copies import Copies
from runtime.weights.reallocate import Moved

CPU = torch.device("cpu")
WORKLOAD = tiny_plan(2, "d2 t1 p1").workload
OTHERS = {role: replace(spec, name="other", ffn=64) for role, spec in WORKLOAD.models.items()}
OTHER_PLAN = replace(tiny_plan(2, "d2 t1 p1"), workload=replace(WORKLOAD, models=OTHERS))
LAGGED = {
    "actor_generate": ("node 0 gpu 0", "d1 t1 p1"),
    "ref_infer": ("node 0 gpu 0", "d1 t1 p1"),
    "critic_infer": ("node 0 gpu 1", "d1 t1 p1"),
    "actor_train": ("node 0 gpu 0", "d1 t1 p1"),
    "critic_train": ("node 0 gpu 1", "d1 t1 p1", {"lag": 1, "offload": True}),
}
LAGGED_PLAN = tiny_plan(2, LAGGED, order=("actor_generate", "critic_train", "ref_infer", "critic_infer", "actor_train"))


APART = {
    "actor_generate": ("node 0 gpu 0", "d1 t1 p1"),
    "ref_infer": ("node 0 gpu 0", "d1 t1 p1"),
    "critic_infer": ("node 0 gpu 1", "d1 t1 p1"),
    "actor_train": ("node 0 gpu 1", "d1 t1 p1"),
    "critic_train": ("node 0 gpu 1", "d1 t1 p1"),
}
APART_PLAN = tiny_plan(2, APART)


def leg(plan: ExecutionPlan, run: RunFile, asks: tuple[int, str, int] | None = None) -> list[Metrics]:
    """A run, or the rest of one, on forked ranks: the metrics of all its iterations; checkpoints and files as kept by
    a launcher. asks: rank, step and iteration in which it is asked to stop."""
    start, output = choose_start(plan, run), Path(run.output)
    scratch = output / ".ranks"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    prepare_folder(run)
    ranks_run = start.of(run)

    def rank() -> None:
        install(CPU)
        recorder = Recorder(scratch, dist.get_rank(), time.time())
        say = recorder.say

        def heard(step: str, iteration: int, *, done: bool = False) -> None:
            say(step, iteration, done=done)
            if (dist.get_rank(), step, iteration) == asks:
                stop_request(scratch).touch()

        recorder.say = heard  # type: ignore[method-assign]
        job = prepare_job(plan, ranks_run)
        executor = Executor(job, GroupCache(CPU), CPU, recorder)
        take_up(executor, ranks_run.resume_from)
        store = dist.FileStore(str(scratch / "store"), plan.cluster.size)
        run_iterations(executor, ranks_run, recorder, StopAgreement(scratch, store, timedelta(minutes=1)))
        if job.reward is not None:
            job.reward.close()

    run_ranks(plan.cluster.size, rank, timeout=PATIENCE_S)
    save_plan(plan, output / "plan.json")
    (output / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    with Monitor(plan, run.iterations, scratch, output, start.lines) as monitor:
        pass
    Completer(run, plan.cluster.size).poll()
    return list(monitor.lines)


def learnt(lines: Any) -> list[dict[str, float]]:
    """Metrics without those of time and memory."""
    return [{k: v for k, v in line.items() if not k.startswith(("timing_s", "perf", "plan/"))} for line in lines]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of two iterations on two ranks with a checkpoint after each."""
    output: Path = tmp_path_factory.mktemp("two") / "out"
    leg(tiny_plan(2, "d2 t1 p1"), tiny_run(output, iterations=2, checkpoint={"every": 1}))
    return output


def test_a_run_goes_on_under_other_plans(two_steps: Path, tmp_path: Path):
    """What it has trained comes from the checkpoint alone: the folders that it began with are not read again."""
    alone = leg(tiny_plan(1, "d1 t1 p1"), tiny_run(tmp_path / "alone", iterations=4))
    keys: dict[str, Any] = {"checkpoint": {"every": 5}}
    trained = tmp_path / "trained"
    shutil.copytree(TINY, trained)
    hollow = {
        name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(TINY / "model.safetensors").items()
    }
    save_file(hollow, trained / "model.safetensors", {"format": "pt"})
    weights = {"actor": str(trained), "critic": str(trained), "ref": str(TINY)}
    four = tiny_run(tmp_path / "four", iterations=3, resume_from=str(two_steps), weights=weights, **keys)
    assert len(leg(tiny_plan(4, "d1 t2 p2"), four)) == 3
    one = tiny_run(tmp_path / "one", iterations=4, resume_from=str(tmp_path / "four"), **keys)
    found = leg(tiny_plan(1, "d1 t1 p1"), one)
    assert len(found) == len(alone) == 4
    for got, want in zip(learnt(found), learnt(alone), strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-4)
    saved = (tmp_path / "one" / "checkpoints" / "global_step_4" / "metrics.jsonl").read_text()
    assert learnt(map(json.loads, saved.splitlines())) == learnt(found)


ADAPTERS = Lora(4, targets=("linear_qkv", "linear_fc1", "linear_fc2"))
MOVED = {
    "actor_generate": ("node 0", "d2 t1 p2"),
    "ref_infer": ("node 0 gpus 0-1", "d1 t2 p1"),  # in the weights beside which the actor's adapters are trained
    "critic_infer": ("node 0 gpu 3", "d1 t1 p1"),
    "actor_train": ("node 0 gpus 0-1", "d1 t2 p1", {"sequence_parallel": True, "micro_batches": 2}),
    "critic_train": ("node 0 gpus 2-3", "d2 t1 p1"),
}


def test_adapters_go_on_under_other_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What moves and what is kept are adapters alone; the base is shared, and comes from the weights of the run."""
    plans = [tiny_plan(1, "d1 t1 p1", lora=ADAPTERS), tiny_plan(2, "d2 t1 p1", lora=ADAPTERS)]
    plans.append(tiny_plan(4, MOVED, lora=ADAPTERS))
    spec = plans[0].workload.models["actor"]
    adapters = {p.name: p.size for p in parameters_of(spec).values()}
    assert all(name.endswith(("lora_a", "lora_b")) for name in adapters)
    make, reallocate = Copies._make, Copies.reallocate

    def watched_make(copies: Copies, copy: Copy) -> None:
        make(copies, copy)
        if copy.role == "ref" and copies._job.plan is plans[2]:
            ref, actor = (copies._base[name] for name in (copy.name, copies._program.homes["actor"].name))
            own = {p.name: held.data_ptr() for p, held in named_shards(actor) if p.frozen}
            assert {p.name: held.data_ptr() for p, held in named_shards(ref)} == own

    def watched_move(copies: Copies, copy: Copy) -> Moved:
        moved = reallocate(copies, copy)
        if copy.role == "actor":
            assert moved.received <= 4 * sum(adapters.values()) < 4 * spec.params / 10
            assert moved.received > 0 or dist.get_rank() < 2
        return moved

    monkeypatch.setattr(Copies, "_make", watched_make)
    monkeypatch.setattr(Copies, "reallocate", watched_move)
    keys: dict[str, Any] = {"iterations": 3, "actor": {"lr": 3e-3}}
    alone = leg(plans[0], tiny_run(tmp_path / "alone", **keys))
    leg(plans[1], tiny_run(tmp_path / "two", **keys | {"iterations": 2, "checkpoint": {"every": 1}}))
    keys |= {"checkpoint": {"every": 5}, "resume_from": str(tmp_path / "two")}
    found = leg(plans[2], tiny_run(tmp_path / "four", **keys))
    assert len(found) == len(alone) == 3
    for got, want in zip(learnt(found), learnt(alone), strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert abs(alone[-1]["actor/reward_kl_penalty"]) > 1e-3, "the adapters learn"
    checkpoint = export_checkpoint(tmp_path / "four", tmp_path / "actor")
    stored = [entry for entry in checkpoint.index.entries if entry.role == "actor"]
    assert sum(entry.entry.size for entry in stored) == sum(adapters.values())
    before, after = (load_file(folder / "model.safetensors") for folder in (TINY, tmp_path / "actor"))
    written = load_file(tmp_path / "actor-adapter" / "adapter_model.safetensors")
    for name, weight in ((name, weight.float()) for name, weight in before.items()):
        at = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{at}.lora_A.weight" in written:
            weight = weight + 2 * written[f"{at}.lora_B.weight"] @ written[f"{at}.lora_A.weight"]
            assert not torch.equal(after[name], before[name].float())
        torch.testing.assert_close(after[name], weight)
    (fault,) = takeover_problems(checkpoint, tiny_plan(1, "d1 t1 p1"))
    assert fault.startswith("`actor` has LoRA of rank 4, alpha 8 on") and fault.endswith("no adapters in the plan")


def test_lag_and_checkpoints_change_nothing(tmp_path: Path):
    """Of a run whose KL coefficient adapts, by the formula of its own metrics."""
    keys: dict[str, Any] = {"ppo": {"kl_target": 0.01, "kl_horizon": 20}}
    plain = leg(LAGGED_PLAN, tiny_run(tmp_path / "plain", iterations=3, **keys))
    every = leg(LAGGED_PLAN, tiny_run(tmp_path / "every", iterations=2, checkpoint={"every": 1, "keep": 5}, **keys))
    first = tmp_path / "every" / "checkpoints" / "global_step_1"
    rest = leg(LAGGED_PLAN, tiny_run(tmp_path / "rest", iterations=3, resume_from=str(first), **keys))
    assert learnt(plain[:2]) == learnt(every)
    assert learnt(plain) == learnt(rest)
    beta = 0.05
    for line in plain:
        kl = line["actor/response_kl"]
        assert line["actor/kl_coefficient"] == pytest.approx(beta)
        assert line["critic/rewards/mean"] == pytest.approx(line["critic/score/mean"] - beta * kl, abs=1e-6)
        beta *= 1 + max(-0.2, min(0.2, kl / 0.01 - 1)) * 8 / 20
    assert plain[0]["actor/kl_coefficient"] > plain[1]["actor/kl_coefficient"]


def test_a_reference_that_follows_is_part_of_the_state(tmp_path: Path):
    """Half the actor's weights after every second iteration, under two plans and from a checkpoint in between."""
    keys: dict[str, Any] = {"reference": {"every": 2, "mix": 0.5}, "actor": {"lr": 1e-3}}
    apart = {"actor_generate": "d2 t1 p1", "ref_infer": ("node 0 gpu 1", "d1 t1 p1"), "actor_train": "d1 t1 p2"}
    sizes: dict[str, Any] = {"algorithm": "grpo", "order": tuple(apart), "batch_size": 4, "group_size": 2}
    alone, plan = tiny_plan(1, "d1 t1 p1", **sizes), tiny_plan(2, apart, **sizes)
    whole = leg(alone, tiny_run(tmp_path / "whole", iterations=4, **keys))
    every = leg(plan, tiny_run(tmp_path / "every", iterations=3, checkpoint={"every": 1, "keep": 5}, **keys))
    rest = {}
    for name, other, iteration in (("same", plan, 2), ("alone", alone, 3)):
        start = str(tmp_path / "every" / "checkpoints" / f"global_step_{iteration}")
        rest[name] = leg(other, tiny_run(tmp_path / name, iterations=4, resume_from=start, **keys))
    assert learnt(rest["same"][:3]) == learnt(every)
    for found in rest.values():
        for got, want in zip(learnt(found), learnt(whole), strict=True):
            assert got == pytest.approx(want, rel=1e-4, abs=1e-4)
    first = open_checkpoint(tmp_path / "every" / "checkpoints" / "global_step_1")
    second = open_checkpoint(tmp_path / "every" / "checkpoints" / "global_step_2")
    before, actor, after = (state(first, "ref"), state(second, "actor"), state(second, "ref"))
    for name, weights in after.items():
        assert torch.allclose(weights, (before[name] + actor[name]) / 2, atol=1e-7), name
    assert any(not torch.equal(after[name], before[name]) for name in after)


def state(checkpoint: Checkpoint, role: str) -> dict[str, torch.Tensor]:
    """The weights of a role in a checkpoint, flat, by parameter."""
    sizes = {name: p.size for name, p in parameters_of(checkpoint.plan.workload.models[role]).items()}
    with CheckpointReader(checkpoint, role) as reader:
        return {name: reader.read(Entry(name, 0, 1, 0, size), MASTER) for name, size in sizes.items()}


def test_a_request_to_stop_loses_nothing(tmp_path: Path):
    """Also one that goes to all processes of the run, as the one does that a user of a batch system chose."""
    keys: dict[str, Any] = {"iterations": 30, "checkpoint": {"every": 2}, "export": False}
    command = arguments(tmp_path, **keys)
    with running(command, tmp_path / "out" / ".ranks", iteration=3) as (process, _):
        os.killpg(os.getpgid(process.pid), signal.SIGUSR1)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and "Traceback" not in said
    assert "stopped by SIGUSR1" in said and "--resume" in said
    done = len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert steps_in(tmp_path / "out" / "checkpoints")[0].name == f"global_step_{done}"
    result = outcome([*command, "--resume", f"iterations={done + 2}"])
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    undisturbed = leg(PLAN, tiny_run(tmp_path / "whole", iterations=done + 2))
    assert learnt(map(json.loads, lines)) == learnt(undisturbed)
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    kept = sorted({done + 2, done + 1 if done % 2 else done})
    assert names == sorted([*(f"global_step_{n}" for n in kept), "latest_checkpointed_iteration.txt"])


def test_a_request_stops_the_run_when_its_iteration_is_done(tmp_path: Path):
    """Also where the ranks that train are not those that generate, which are ready for the next iteration by then. The
    rest follows to the same bits."""
    keys: dict[str, Any] = {"iterations": 3, "checkpoint": {"every": 5}}
    whole = leg(APART_PLAN, tiny_run(tmp_path / "whole", iterations=3))
    run = tiny_run(tmp_path / "stopped", **keys)
    done = leg(APART_PLAN, run, asks=(1, "critic_train", 1))
    assert [path.name for path in steps_in(run.checkpoint_folder)] == ["global_step_2"] and len(done) == 2
    rest = leg(APART_PLAN, run.model_copy(update={"resume_from": str(run.checkpoint_folder)}))
    assert learnt(done) == learnt(whole[:2]) and learnt(rest) == learnt(whole)
    # Where training lags, the other rank may have begun one more.
    lagged = tiny_run(tmp_path / "lagged", **keys | {"iterations": 4})
    assert len(leg(LAGGED_PLAN, lagged, asks=(1, "critic_train", 1))) in (2, 3)


def damage(rng: random.Random, folder: Path) -> str:
    """One fault in a checkpoint, as disks, copies and people make them."""
    files = sorted(path for path in folder.iterdir())
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    match rng.choice(["missing", "truncated", "flipped", "longer", "swapped", "shape", "other model", "tensors"]):
        case "missing":
            path.unlink()
            return f"{path.name} missing"
        case "truncated":
            path.write_bytes(data[: rng.randrange(len(data))])
            return f"{path.name} truncated"
        case "flipped":
            bit = rng.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            return f"{path.name} flipped at bit {bit}"
        case "longer":
            path.write_bytes(data + b"\0")
            return f"{path.name} longer"
        case "swapped":
            one, two = rng.sample([p for p in files if p.suffix == ".safetensors"], 2)
            one.rename(folder / "x"), two.rename(one), (folder / "x").rename(two)
            return f"{one.name} and {two.name} swapped"
        case "other model":
            save_plan(OTHER_PLAN, folder / "plan.json")
            return reseal(folder, "plan.json")
        case "tensors":
            path = rng.choice([p for p in files if p.suffix == ".safetensors"])
            tensors = load_file(path)
            name = rng.choice(sorted(tensors))
            change = rng.choice([lambda t: t[:-1].clone(), lambda t: t.reshape(1, -1), lambda t: t.bfloat16()])
            save_file(tensors | {name: change(tensors[name])}, path)
            return reseal(folder, path.name)
    index = json.loads((folder / "index.json").read_text())
    entry = rng.choice(index["entries"])
    entry[rng.choice(["start", "stop", "part", "parts"])] += rng.choice([-1, 1, 2])
    (folder / "index.json").write_text(json.dumps(index))
    seal = min(entry["start"], entry["stop"], entry["part"], entry["parts"] - 1) >= 0 and rng.random() < 0.5
    return f"entry of {entry['parameter']}" + (f", {reseal(folder)}" if seal else "")


def reseal(folder: Path, name: str = "") -> str:
    """Give a file and the index the digests of what they hold now, as a tool that knows the format would."""
    index = CheckpointIndex.model_validate_json((folder / "index.json").read_text())
    files = index.files | ({name: seal_of(folder / name)} if name else {})
    (folder / "index.json").write_text(sealed_index(index.model_copy(update={"files": files})))
    return f"{name or 'the index'} altered and sealed again"


def test_damaged_checkpoints_are_refused(two_steps: Path, tmp_path: Path, request: pytest.FixtureRequest):
    plan, good = tiny_plan(2, "d2 t1 p1"), two_steps / "checkpoints" / "global_step_2"
    assert usable(good, plan).index.iteration == 2
    for number in range(request.config.getoption("--damages")):
        folder = tmp_path / "checkpoints" / "global_step_2"
        shutil.copytree(good, folder)
        what = damage(random.Random(number), folder)
        with pytest.raises(CheckpointError) as error:
            usable(folder, plan)
        assert str(folder) in error.value.message and "\n" not in error.value.message, what
        shutil.rmtree(folder)


def test_the_one_before_a_bad_one_is_used(two_steps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plan = tiny_plan(2, "d2 t1 p1")
    shutil.copytree(two_steps / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "global_step_2" / "rank-00001.safetensors").unlink()
    start = choose_start(plan, tiny_run(tmp_path, resume_from=str(tmp_path)))
    assert (start.iteration, len(start.lines)) == (1, 1)
    said = capsys.readouterr().err
    assert "global_step_2` cannot be used: `rank-00001.safetensors` is missing; the one before is used" in said
    (tmp_path / "checkpoints" / "global_step_1" / "index.json").unlink()
    with pytest.raises(CheckpointError, match=r"global_step_2` cannot be used.*\n.*global_step_1` cannot be used"):
        choose_start(plan, tiny_run(tmp_path, resume_from=str(tmp_path)))


def test_a_plan_of_other_work_takes_nothing_over(two_steps: Path):
    checkpoint = open_checkpoint(two_steps / "checkpoints" / "global_step_2")
    assert not takeover_problems(checkpoint, tiny_plan(4, "d1 t2 p2", dtype="bf16"))
    assert takeover_problems(checkpoint, tiny_plan(1, "d1 t1 p1", batch_size=16)) == [
        "batch_size is 8 there and 16 in the plan"
    ]
    critic_free = tiny_plan(
        1, "d1 t1 p1", algorithm="grpo", order=("actor_generate", "ref_infer", "actor_train"), group_size=2
    )
    assert takeover_problems(checkpoint, critic_free)[0] == "it was written by ppo, the plan runs grpo"
    assert newest_usable(two_steps / "checkpoints", critic_free)[0] is None


def test_check_says_whether_a_plan_can_go_on(two_steps: Path, tmp_path: Path):
    for name, plan in (("other", tiny_plan(4, "d1 t2 p2")), ("larger", tiny_plan(1, "d1 t1 p1", batch_size=16))):
        save_plan(plan, tmp_path / f"{name}.json")
    check = [sys.executable, "-m", "planner.cli", "check", "--resume-from", str(two_steps)]
    said = {}
    for name in ("other", "larger"):
        command = [*check, str(tmp_path / f"{name}.json")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
        said[name] = (done.returncode, " ".join(done.stderr.split()))
    assert said["other"][0] == 0 and ": 2 iterations are done" in said["other"][1]
    assert said["larger"][0] == 1 and "batch_size is 8 there and 16 in the plan" in said["larger"][1]


def test_a_new_run_does_not_mix_with_old_checkpoints(two_steps: Path, tmp_path: Path):
    folder = str(two_steps / "checkpoints")
    run = tiny_run(tmp_path, checkpoint={"every": 1, "folder": folder})
    with pytest.raises(ValueError, match="holds checkpoints of another run, such as `global_step_2`"):
        prepare_folder(run)
    assert choose_start(PLAN, run) == Start()
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        choose_start(PLAN, tiny_run(tmp_path, resume_from=str(tmp_path / "nowhere")))
    with pytest.raises(CheckpointError, match="has 2 iterations, the run 1"):
        choose_start(PLAN, tiny_run(tmp_path, iterations=1, resume_from=folder))
