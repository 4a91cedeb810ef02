"""Evaluation: responses to prompts that training never sees, by the likeliest tokens, scored with the run's rewards."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plans.algorithms import GREEDY, tensor_kind
from plans.files import write_atomically, writing
from plans.program import Step, StepKind, scoring_program
from plans.run_output import BEST, EVALUATIONS
from plans.runfile import RunFile
from runtime.calls.experience import settled
from runtime.executor import Executor
from runtime.groups import GroupCache
from runtime.job import Job
from runtime.reports.records import Records, lines_before
from runtime.reports.stats import Stat
from runtime.sequences import Sequences

_SCORE, _LENGTH = 0, 1


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What an evaluation after `iteration` iterations found, by prompt: scores and response lengths; of the first few
    prompts also the token ids of the responses."""

    iteration: int
    scores: tuple[float, ...]
    lengths: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    seconds: float

    @property
    def score(self) -> float:
        """The mean score."""
        return fmean(self.scores)


class _Where:
    """Says where this rank is, and keeps nothing else: the spans and statistics of a run are those of training."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self.iteration = 0

    def say(self, step: str, iteration: int, *, done: bool = False) -> None:
        self._records.say(f"evaluation: {step}", self.iteration)

    def span(self, step: Step, iteration: int) -> AbstractContextManager[None]:
        return nullcontext()

    def add_span(self, name: str, kind: StepKind, iteration: int, start_s: float, end_s: float) -> None:
        pass

    def add(self, iteration: int, stats: Mapping[str, Stat]) -> None:
        pass

    def show(self, iteration: int, samples: Iterable[Mapping[str, Any]]) -> None:
        pass

    def finish(self, iteration: int) -> None:
        pass


class Evaluator(Executor):
    """Runs what generates and scores of a program, on held-out prompts and with the weights of `main`. Making and
    running it is collective over all ranks of the cluster."""

    def __init__(self, main: Executor, job: Job, groups: GroupCache, device: torch.device, records: Records) -> None:
        self._where = _Where(records)
        super().__init__(job.evaluation(), groups, device, self._where, main=main)
        assert job.held_out is not None
        self.program = scoring_program(self.program)
        self._plan, self._prompts = job.plan, job.held_out
        self._shown = min(job.run.samples, self._prompts.count)
        self._begin()

    def _begin(self) -> None:
        self._numbers = torch.zeros(2, self._prompts.count, dtype=torch.float64)
        self._texts = torch.zeros(self._shown, self._plan.workload.response_tokens, dtype=torch.int64)

    def evaluate(self, iteration: int) -> Evaluated:
        """Score the weights after `iteration` iterations; the same on every rank."""
        dist.all_reduce(torch.zeros(1))  # ranks that train longer come later; the seconds are those of the evaluation
        began = time.perf_counter()
        self._begin()
        self._where.iteration = iteration
        self.state.iterations = 0
        self.run(self._prompts.passes)
        for found in (self._numbers, self._texts):  # each prompt is with one rank; the others have zeros
            dist.all_reduce(found)
        scores, lengths = self._numbers.tolist()
        tokens = [tuple(row[: round(length)]) for row, length in zip(self._texts.tolist(), lengths, strict=False)]
        return Evaluated(
            iteration, tuple(scores), tuple(map(round, lengths)), tuple(tokens), time.perf_counter() - began
        )

    def _finish(self, iteration: int) -> None:
        """Take the scores, which no step of an evaluation reads, and count those that this rank answers for."""
        for begun, name in list(self._scores):
            self._take_scores(name, begun)
        for call in self._plan.workload.graph.calls:
            for key in call.outputs:
                if self._answers_for(call.name) and not key.endswith(GREEDY):
                    self._count(call.name, key, iteration)
        self._store.drop(iteration)
        self._store.settle(iteration)

    def _answers_for(self, call: str) -> bool:
        place = self._plan.layout(self._plan.workload.graph.host(call)).places.get(self._rank)
        return place is not None and place.tp == place.pp == place.cp == 0

    def _count(self, call: str, key: str, iteration: int) -> None:
        rows = [row for row in self._share(call, iteration).samples if self._prompts.holds(iteration, row)]
        first = iteration * self._plan.workload.samples
        if tensor_kind(key) == "rewards":
            values = self._store.get(iteration, key, rows)
            assert isinstance(values, Tensor)
            # nan is a reward that failed where the run file does not stop for it: no point for that answer.
            self._numbers[_SCORE, [first + row for row in rows]] += settled(self._job, values).double().cpu()
        elif tensor_kind(key) == "sequences":
            made = self._store.get(iteration, key, rows)
            assert isinstance(made, Sequences)
            for row, (_, response) in zip(rows, made.texts(), strict=True):
                self._numbers[_LENGTH, first + row] = len(response)
                if first + row < self._shown:
                    self._texts[first + row, : len(response)] = torch.tensor(response)


class EvaluationLog:
    """`evaluation.jsonl` in the output, and whether an evaluation is the best so far; on rank 0 alone."""

    def __init__(self, job: Job, iterations: int) -> None:
        assert job.held_out is not None
        self._job, self._prompts = job, job.held_out
        self._file = Path(job.run.output) / EVALUATIONS
        earlier = lines_before(self._file, iterations)
        self._lines: list[dict[str, Any]] = [json.loads(line) for line in earlier]
        write_atomically(self._file, "".join(earlier))

    def add(self, found: Evaluated) -> bool:
        """Keep and tell an evaluation; whether none before was as good."""
        most = self._job.plan.workload.response_tokens
        line: dict[str, Any] = {
            "iteration": found.iteration,
            "val/score/mean": found.score,
            "val/response_length/mean": fmean(found.lengths),
            "val/response_length/clip_ratio": fmean(length >= most for length in found.lengths),
            "timing_s/testing": found.seconds,
            "scores": found.scores,
            "samples": self._samples(found),
        }
        best = all(found.score > other["val/score/mean"] for other in self._lines)
        self._lines.append(line)
        with writing(self._file), self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        said = f"{len(found.scores)} prompts, {fmean(found.lengths):.1f} tokens each, {found.seconds:.2f} s"
        print(f"evaluation after {found.iteration}: score {found.score:+.3f}  ({said})", file=sys.stderr, flush=True)
        return best

    def _samples(self, found: Evaluated) -> list[dict[str, Any]]:
        assert self._job.tokenizer is not None
        asked = self._prompts.asked(0, range(len(found.responses)))
        return [
            {"prompt": prompt, "response": self._job.tokenizer.decode(ids), "score": score}
            for prompt, ids, score in zip(asked, found.responses, found.scores, strict=False)
        ]


class Evaluations:
    """The evaluations of a run on this rank: when, and what becomes of the best weights."""

    def __init__(self, main: Executor, evaluator: Evaluator, job: Job, rank: int, done: int) -> None:
        self._main, self._evaluator, self._run = main, evaluator, job.run
        self._log = EvaluationLog(job, done) if rank == 0 else None

    def due(self, iteration: int) -> bool:
        """Whether the weights after so many iterations are evaluated."""
        return due(self._run, iteration)

    def evaluate(self, iteration: int) -> None:
        """Score the present weights. Collective over all ranks."""
        found = self._evaluator.evaluate(iteration)
        best = torch.tensor([int(self._log is not None and self._log.add(found))])
        if self._run.evaluation.keep_best:
            dist.broadcast(best, src=0)
            if best.item():
                self._main.export(next(iter(self._main.program.homes)), Path(self._run.output) / BEST, keeps=False)


def due(run: RunFile, iteration: int) -> bool:
    """Whether a run evaluates the weights after so many iterations: the first, the last, and every `every`-th."""
    every = run.evaluation.every
    return bool(every) and (iteration % every == 0 or iteration == run.iterations)
