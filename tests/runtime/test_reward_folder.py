"""A reward model out of a Hugging Face folder scores a run as transformers does, and what the run exports loads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plan_cases import TINY, tiny_plan, tiny_run
from ranks import run_ranks
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from plans.plan import ExecutionPlan
from runtime.batches.transfer import BatchStore
from runtime.executor import Executor
from runtime.groups import GroupCache
from runtime.job import prepare_job
from runtime.models.installation import install
from runtime.reports.records import Recorder
from runtime.sequences import Sequences

CPU = torch.device("cpu")
CALLS = ("actor_generate", "actor_infer", "ref_infer", "reward_infer", "actor_train")
Scores = dict[tuple[int, int], tuple[list[int], float]]


def reward_folder(folder: Path) -> Path:
    """A classifier with one output on the architecture of the actor, as people publish reward models."""
    config: PretrainedConfig = AutoConfig.from_pretrained(TINY, num_labels=1, pad_token_id=0)
    torch.manual_seed(5)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def scored(plan: ExecutionPlan, folder: Path, reward: Path) -> Scores:
    """(iteration, sample) -> tokens and score of a run on forked ranks, which exports its actor."""
    run = tiny_run(folder, iterations=2, reward="", weights={"actor": str(TINY), "reward": str(reward)})

    def rank() -> Scores:
        install(CPU)
        found: Scores = {}
        put = BatchStore.put

        def watch(store: BatchStore, iteration: int, key: str, rows: Sequence[int], values: Any) -> None:
            put(store, iteration, key, rows, values)
            if key == "rewards":
                for row, score in zip(rows, values.tolist(), strict=True):
                    sequences = store.get(iteration, "sequences", [row])
                    assert isinstance(sequences, Sequences)
                    ((prompt, response),) = sequences.texts()
                    found[iteration, row] = [*prompt, *response], score

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BatchStore, "put", watch)
            executor = Executor(
                prepare_job(plan, run), GroupCache(CPU), CPU, Recorder(folder, dist.get_rank(), time.time())
            )
            executor.run(run.iterations)
            executor.export("actor", folder / "actor")
        return found

    return {key: value for found in run_ranks(plan.cluster.size, rank) for key, value in found.items()}


@pytest.mark.parametrize("reward_place", ["d2 t1 p1", "d1 t2 p1"])
def test_a_folder_scores_as_transformers_does(reward_place: str, tmp_path: Path) -> None:
    reward = reward_folder(tmp_path / "reward")
    places = {**dict.fromkeys(CALLS, "d2 t1 p1"), "reward_infer": reward_place}
    sizes = {"algorithm": "grpo", "order": CALLS, "batch_size": 4, "group_size": 2, "minibatches": 1}
    found = scored(tiny_plan(2, places, reward_model=True, **sizes), tmp_path, reward)
    assert len(found) == 2 * 8
    model = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32)
    for tokens, score in found.values():
        assert score == pytest.approx(model(torch.tensor([tokens])).logits.item(), abs=1e-5)
    assert len({round(score, 4) for _, score in found.values()}) > 4
    actor = AutoModelForCausalLM.from_pretrained(tmp_path / "actor", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    changed = [(a - b).abs().max().item() for a, b in zip(actor.parameters(), before.parameters(), strict=True)]
    assert max(changed) > 1e-5
