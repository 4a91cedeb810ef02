"""Runs on forked ranks, what they generate and report, and whether two are the same."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from plans.plan import ExecutionPlan
from plans.program import compile_program
from plans.runfile import RunFile
from runtime.batches.transfer import BatchStore
from runtime.executor import Executor
from runtime.groups import GroupCache
from runtime.job import prepare_job
from runtime.models.installation import install
from runtime.reports.metrics import Metrics, iteration_metrics
from runtime.reports.records import Recorder, RecordReader
from runtime.sequences import Sequences

CPU = torch.device("cpu")
Tokens = dict[tuple[int, int], tuple[list[int], list[int]]]
Outcome = tuple[list[Metrics], Tokens]


class Watcher:
    """Keeps the tokens that a rank generates or receives, and the reference model's log-probabilities."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: Tokens = {}
        self.ref: dict[tuple[int, int], Tensor] = {}
        put = BatchStore.put

        def watch(store: BatchStore, iteration: int, key: str, rows: Sequence[int], values: Sequences | Tensor) -> None:
            put(store, iteration, key, rows, values)
            if key == "sequences":
                for row in rows:
                    found = store.get(iteration, key, [row])
                    assert isinstance(found, Sequences)
                    tokens = found.texts()[0]
                    assert self.tokens.setdefault((iteration, row), tokens) == tokens
            if key == "ref_logprobs":
                self.ref.update({(iteration, row): store.get(iteration, key, [row]) for row in rows})

        monkeypatch.setattr(BatchStore, "put", watch)


def execute(plan: ExecutionPlan, run: RunFile, folder: Path, export: bool = False) -> Outcome:
    """Metrics of every iteration, and the tokens of every sample, of a run on forked ranks."""

    def rank() -> Tokens:
        install(CPU)
        with pytest.MonkeyPatch.context() as monkeypatch:
            watcher = Watcher(monkeypatch)
            recorder = Recorder(folder, dist.get_rank(), time.time())
            executor = Executor(prepare_job(plan, run), GroupCache(CPU), CPU, recorder)
            executor.run(run.iterations)
            if export:
                executor.export("actor", folder / "actor")
        return watcher.tokens

    tokens: Tokens = {}
    for found in run_ranks(plan.cluster.size, rank):
        for key, value in found.items():
            assert tokens.setdefault(key, value) == value
    program = compile_program(plan)
    reader = RecordReader(folder, tuple(r for r in range(plan.cluster.size) if program.projection(r)))
    return [iteration_metrics(program, records) for records in reader.poll()], tokens


COUNTS = ("clipfrac", "accuracies")
"""Metrics that count where one number exceeds another: at a tie, rounding decides."""


def compare(found: Outcome, wanted: Outcome, samples: int) -> None:
    """The same tokens in all iterations; the same losses, within 1e-5 in the first and 1e-4 in later ones."""
    assert found[1] == wanted[1] and len(found[1]) == samples
    assert {"actor/pg_loss", "actor/grad_norm", "actor/entropy", "critic/advantages/max"} <= set(wanted[0][0])
    compare_losses(found, wanted)


def compare_losses(found: Outcome, wanted: Outcome) -> None:
    """The same losses and norms."""
    for iteration, (ours, theirs) in enumerate(zip(found[0], wanted[0], strict=True)):
        keys = [key for key in theirs if key.startswith(("actor/", "critic/")) and not key.endswith(COUNTS)]
        for key in keys:
            limit = (1e-5 if iteration == 0 else 1e-4) * max(1.0, abs(theirs[key]))
            assert abs(ours[key] - theirs[key]) <= limit, f"iteration {iteration}: {key}"
