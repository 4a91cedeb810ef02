"""Evaluations: greedy responses of transformers on prompts that training never sees, in every layout, run after run."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plan_cases import TINY, tiny_plan, tiny_run
from ranks import run_ranks
from reward_cases import vowels
from transformers import AutoModelForCausalLM

from plans.errors import RealplanError
from plans.plan import ExecutionPlan
from plans.program import StepKind, compile_program, scoring_program
from plans.runfile import RunFile, load_run
from runtime.batches.tokenizer import Tokenizer
from runtime.checkpoints.course import run_iterations
from runtime.checkpoints.stopping import StopAgreement
from runtime.evaluation import Evaluations, Evaluator
from runtime.executor import Executor
from runtime.groups import GroupCache
from runtime.job import prepare_job
from runtime.models.installation import install
from runtime.reports.records import Recorder

CPU = torch.device("cpu")
HELD_OUT = 19  # more than the 8 samples of a pass, and no multiple of them
DISJOINT = {
    "actor_generate": "d2 t1 p1",
    "ref_infer": ("node 0 gpu 1", "d1 t1 p1"),
    "actor_train": ("node 0 gpu 0", "d1 t1 p1"),
}
WHOLE = dict.fromkeys(DISJOINT, "d1 t1 p1")
CUT = {"actor_generate": "d1 t2 p1", "ref_infer": "d2 t1 p1", "actor_train": "d1 t1 p2"}
SIZES = {"algorithm": "grpo", "order": tuple(DISJOINT), "batch_size": 4, "group_size": 2, "minibatches": 1}


def lines_of(plan: ExecutionPlan, run: RunFile, folder: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """`evaluation.jsonl` of a run on forked ranks that exports its actor, and the prompts that it trained on."""
    scratch = folder / ".ranks"

    def rank() -> set[str]:
        install(CPU)
        recorder, groups = Recorder(scratch, dist.get_rank(), time.time()), GroupCache(CPU)
        job = prepare_job(plan, run)
        executor = Executor(job, groups, CPU, recorder)
        evaluator = Evaluator(executor, job, groups, CPU, recorder)
        evaluations = Evaluations(executor, evaluator, job, dist.get_rank(), 0)
        store = dist.FileStore(str(scratch / "store"), dist.get_world_size())
        run_iterations(executor, run, recorder, StopAgreement(scratch, store, timedelta(minutes=1)), evaluations)
        executor.export("actor", folder / "actor")
        if job.reward is not None:
            job.reward.close()
        assert job.prompts is not None
        rows = range(plan.workload.batch_size)
        return {text for i in range(run.iterations) for text in job.prompts.asked(i, rows) or ()}

    trained = run_ranks(plan.cluster.size, rank, timeout=300)
    text = (folder / "evaluation.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()], set.union(*trained)


def expected(folder: Path, prompts: list[str], tokens: int) -> list[float]:
    """Scores of the greedy responses of transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), Tokenizer.of_folder(TINY)
    scores = []
    for ids, prompt in zip(tokenizer.encode_batch(prompts), prompts, strict=True):
        made = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), do_sample=False,
            max_new_tokens=tokens, eos_token_id=list(tokenizer.eos_ids), pad_token_id=0,
        )  # fmt: skip
        scores += vowels([prompt], [tokenizer.decode(made[0, len(ids) :].tolist())])
    return scores


@pytest.mark.parametrize(("gpus", "places"), [(2, DISJOINT), (2, CUT)])
def test_scores_are_those_of_transformers(gpus: int, places: Any, tmp_path: Path) -> None:
    plan = tiny_plan(gpus, places, **SIZES)
    evaluation = {"every": 2, "held_out": HELD_OUT, "keep_best": True}
    run = tiny_run(tmp_path, iterations=3, evaluation=evaluation, samples=HELD_OUT)
    lines, trained = lines_of(plan, run, tmp_path)
    assert [line["iteration"] for line in lines] == [0, 2, 3]
    prompts = [sample["prompt"] for sample in lines[0]["samples"]]
    assert len(set(prompts)) == HELD_OUT and trained and not trained & set(prompts)
    for line, folder in ((lines[0], TINY), (lines[-1], tmp_path / "actor")):
        wanted = expected(folder, prompts, plan.workload.response_tokens)
        assert line["scores"] == pytest.approx(wanted, abs=1e-6)
        assert line["val/score/mean"] == pytest.approx(sum(wanted) / HELD_OUT, abs=1e-6)
        assert [vowels([], [sample["response"]])[0] for sample in line["samples"]] == pytest.approx(wanted, abs=1e-6)
    best = max(lines, key=lambda line: line["val/score/mean"])
    wanted = expected(tmp_path / "best", prompts, plan.workload.response_tokens)
    assert wanted == pytest.approx(best["scores"], abs=1e-6)


def test_a_reward_model_scores_evaluations_too(tmp_path: Path) -> None:
    sizes = {**SIZES, "order": ("actor_generate", "actor_infer", "ref_infer", "reward_infer", "actor_train")}
    weights = {"actor": str(TINY), "reward": "random"}
    scores = []
    for gpus, reward in ((1, "d1 t1 p1"), (2, ("node 0 gpu 1", "d1 t1 p1"))):
        places = {**WHOLE, "actor_infer": "d1 t1 p1", "reward_infer": reward}
        if gpus == 2:
            places |= {**DISJOINT, "actor_infer": "d2 t1 p1"}
        run = tiny_run(
            tmp_path / str(gpus), iterations=1, weights=weights, reward="",
            evaluation={"every": 1, "held_out": HELD_OUT},
        )  # fmt: skip
        (tmp_path / str(gpus)).mkdir()
        lines, _ = lines_of(tiny_plan(gpus, places, reward_model=True, **sizes), run, tmp_path / str(gpus))
        scores.append(lines[0]["scores"])
    assert len({round(score, 3) for score in scores[0]}) > 1
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)


def test_a_lagging_plan_is_scored_by_what_generates_and_scores() -> None:
    plan = tiny_plan(2, {**DISJOINT, "ref_infer": ("node 0 gpu 1", "d1 t1 p1", {"lag": 1}),
                         "actor_train": ("node 0 gpu 0", "d1 t1 p1", {"lag": 1})}, staleness=1, **SIZES)  # fmt: skip
    steps = [step for step in scoring_program(compile_program(plan)).steps if step.kind is not StepKind.TRANSFER]
    kinds = [(step.kind, step.name) for step in steps]
    assert [name for kind, name in kinds if kind in (StepKind.CALL, StepKind.FUNCTION)] == ["actor_generate", "reward"]
    assert kinds[0][0] is StepKind.REALLOCATE and kinds[-1][0] is StepKind.RELEASE
    assert {step.lag for step in steps} == {0}


def test_what_an_evaluation_lacks_is_named(tmp_path: Path) -> None:
    for keys, words in (
        (["evaluation.every=2"], "needs prompts of its own"),
        (["evaluation.every=2", "evaluation.held_out=3", "evaluation.source=x.jsonl"], "needs prompts of its own"),
    ):
        with pytest.raises(RealplanError, match=words):
            load_run(None, keys)
    plan = tiny_plan(1, WHOLE, **SIZES)
    with pytest.raises(RealplanError, match="leaves none of 210 prompts"):
        prepare_job(plan, tiny_run(tmp_path, evaluation={"every": 1, "held_out": 500}))
