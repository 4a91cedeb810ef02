"""Plan invariance over random plans with long-tailed lengths: the tokens, losses and gradient norms of one process.

CI plays a few; `--plans 100` plays more, and `--first-plan` says from which number on.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plan_cases import FIXTURES, tiny_run
from random_plans import KINDS, SIZES, Kind, RandomPlan, plan_alone, random_plan
from ranks import run_ranks
from torch import Tensor

from plans.algorithms import GREEDY
from plans.plan import ExecutionPlan
from plans.program import compile_program
from plans.runfile import RunFile
from runtime.batches.transfer import BatchStore
from runtime.executor import Executor
from runtime.generation.sampling import Chooser, log_uniforms, sample_keys, step_seeds
from runtime.groups import GroupCache
from runtime.job import Job, prepare_job
from runtime.models.installation import install
from runtime.reports.metrics import Metrics, iteration_metrics
from runtime.reports.records import Recorder, RecordReader
from runtime.sequences import Sequences

CPU = torch.device("cpu")
ITERATIONS = 2
RESPONSE = SIZES["response_tokens"]
COUNTS = ("clipfrac", "accuracies")
"""Metrics that count where one number exceeds another: at a tie, rounding decides."""
Tokens = dict[tuple[int, int, str], tuple[list[int], list[int]]]
"""By iteration, sample and name of the tensor."""
Margins = dict[tuple[int, int, bool], float]
"""By both seeds of a token and whether it was greedy: how far the score of the second best token lay below."""
NEAR = 1e-5
"""A smaller margin is rounding's to decide."""


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    metrics: list[Metrics]
    tokens: Tokens
    margins: Margins


def long_tail(seed: int, longest: int) -> int:
    """A length of a long tail from 1 to `longest`: a median of an eighth of it, one in ten near the end."""
    return max(1, min(longest, round(longest / 8 * random.Random(seed).lognormvariate(0, 1.5))))


def ended(tokens: Sequence[int], old: int) -> int | None:
    """A response is as long as its first two tokens say."""
    if len(tokens) < 2:
        return None
    end = max(2, long_tail(1_000_003 * tokens[0] + tokens[1], RESPONSE))
    return end if end <= len(tokens) else None


def long_tailed_data(path: Path) -> Path:
    """Prompts and given responses of very different lengths, in words of the small model."""
    lines = [json.loads(line)["prompt"].split() for line in (FIXTURES / "prompts.jsonl").read_text().splitlines()]
    words = [word for line in lines for word in line]

    def text(seed: int, longest: int) -> str:
        start = seed * 37 % len(words)
        return " ".join((words * 2)[start : start + long_tail(seed, longest)])

    rows = []
    for i in range(16):
        texts = {"prompt": text(4 * i, 12), "response": text(4 * i + 1, 20)}
        rows.append(json.dumps(texts | {"chosen": text(4 * i + 2, 20), "rejected": text(4 * i + 3, 20)}) + "\n")
    path.write_text("".join(rows))
    return path


def play(plans: Sequence[tuple[Kind, ExecutionPlan]], folder: Path) -> list[Outcome]:
    """What plans of one number of ranks do, played one after the other by the same ranks. Margins are those of rank 0,
    which of a plan on one process are all."""
    runs = {kind: run_of(kind, folder) for kind, _ in plans}

    def rank() -> list[tuple[Tokens, Margins]]:
        install(CPU)
        found, groups = [], GroupCache(CPU)
        for number, (kind, plan) in enumerate(plans):
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(Job, "ended", property(lambda job: None if job.offline else ended))
                found.append((_tokens(monkeypatch), _margins(monkeypatch) if dist.get_world_size() == 1 else {}))
                recorder = Recorder(folder / str(number), dist.get_rank(), time.time())
                Executor(prepare_job(plan, runs[kind]), groups, CPU, recorder).run(ITERATIONS)
        return found

    for number in range(len(plans)):
        (folder / str(number)).mkdir(parents=True)
    every = run_ranks(plans[0][1].cluster.size, rank, timeout=1800)
    outcomes = []
    for number, (_, plan) in enumerate(plans):
        tokens: Tokens = {}
        for found in every:
            for key, value in found[number][0].items():
                assert tokens.setdefault(key, value) == value
        program = compile_program(plan)
        reader = RecordReader(folder / str(number), tuple(r for r in range(plan.cluster.size) if program.projection(r)))
        metrics = [iteration_metrics(program, records) for records in reader.poll()]
        outcomes.append(Outcome(metrics, tokens, every[0][number][1]))
    return outcomes


def _tokens(monkeypatch: pytest.MonkeyPatch) -> Tokens:
    """What will be put into the store of a rank as sequences."""
    put, tokens = BatchStore.put, Tokens()

    def watch(store: BatchStore, iteration: int, key: str, rows: Sequence[int], values: Any) -> None:
        put(store, iteration, key, rows, values)
        if isinstance(values, Sequences):
            tokens.update({(iteration, row, key): text for row, text in zip(rows, values.texts(), strict=True)})

    monkeypatch.setattr(BatchStore, "put", watch)
    return tokens


def _margins(monkeypatch: pytest.MonkeyPatch) -> Margins:
    """Margins of all tokens that this process will choose, from the whole vocabulary at a temperature of 1."""
    choose, margins = Chooser.__call__, Margins()

    def watch(self: Chooser, logits: Tensor, seeds: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores, greedy = logits[:, : self.size].clone(), self.sampling.greedy
        if not greedy:
            scores -= (-log_uniforms(self._hashes, seeds)).log()
        best, tokens = scores.topk(2, -1)
        for (first, second), (above, below) in zip(seeds.t().tolist(), best.tolist(), strict=True):
            margins[first, second, greedy] = above - below
        chosen = choose(self, logits, seeds, seen)
        sure = best[:, 0] - best[:, 1] > NEAR
        assert chosen[0][sure].equal(tokens[sure, 0])
        return chosen

    monkeypatch.setattr(Chooser, "__call__", watch)
    return margins


def first_margins(found: Tokens, wanted: Outcome, seed: int) -> list[float]:
    """The reference's margins at the first differing token of each response of the first iteration that has any."""
    wrong = [key for key, texts in wanted.tokens.items() if found.get(key) != texts]
    margins = []
    for iteration, row, name in (key for key in wrong if key[0] == min(wrong)[0]):
        ours, theirs = (tokens.get((iteration, row, name), ([], []))[1] for tokens in (found, wanted.tokens))
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), -1)
        if place < 0:  # a length or a prompt differs, which no margin excuses
            return [inf]
        keys = sample_keys(seed, iteration, torch.tensor([row]))
        first, second = step_seeds(keys, torch.tensor([place])).flatten().tolist()
        margins.append(wanted.margins[first, second, name.endswith(GREEDY)])
    return margins


def differences(found: Outcome, wanted: Outcome, minibatches: int) -> list[str]:
    """Where a run differs from that of one process: tokens at all, losses and norms by more than 1e-4, by 1e-5 before
    the first optimizer step has been made: Adam's first ones make a step of the learning rate out of the least
    rounding."""
    if found.tokens != wanted.tokens:
        return [f"tokens of {[key for key in wanted.tokens if found.tokens.get(key) != wanted.tokens[key]][:3]}"]
    wrong = []
    assert len(found.metrics) == len(wanted.metrics) == ITERATIONS
    for iteration, (ours, theirs) in enumerate(zip(found.metrics, wanted.metrics, strict=True)):
        for key in theirs:
            if key.startswith(("actor/", "critic/", "response_length")) and not key.endswith(COUNTS):
                limit = (1e-5 if iteration == 0 and minibatches == 1 else 1e-4) * max(1.0, abs(theirs[key]))
                if not abs(ours[key] - theirs[key]) <= limit:
                    wrong.append(f"iteration {iteration}: {key} {ours[key]:.7g}, alone {theirs[key]:.7g}")
    return wrong


def run_of(kind: Kind, folder: Path) -> RunFile:
    """The run of every random plan of a kind."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"source": str(long_tailed_data(folder / "data.jsonl"))}
    random_ones: dict[str, Any] = {} if kind.model == "llama" else {"weights": "random", "data": {"source": ""}}
    if kind.model in ("experts", "shared"):
        balanced = {"lr": 3e-4, "router_aux_loss_coef": 0.1}
        random_ones |= {"actor": balanced, "critic": balanced}
    keys = {"iterations": ITERATIONS, "timeout_s": 300, "sampling": {"stop_at_eos": False}, "data": data} | random_ones
    return tiny_run(folder, **keys)


def test_random_plans_reproduce_one_process(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    count, first = pytestconfig.getoption("--plans"), pytestconfig.getoption("--first-plan")
    cases = [random_plan(seed) for seed in range(first, first + count)]
    kinds = [kind for kind in KINDS if any(case.kind == kind for case in cases)]
    alone = dict(zip(kinds, play([(kind, plan_alone(kind)) for kind in kinds], tmp_path / "alone"), strict=True))
    assert_long_tail([len(response) for one in alone.values() for _, response in one.tokens.values()])
    wrong, near = dict[int, list[str]](), dict[int, list[float]]()
    for ranks in sorted({case.plan.cluster.size for case in cases}):
        for number, part in enumerate(_parts([case for case in cases if case.plan.cluster.size == ranks])):
            found = play([(case.kind, case.plan) for case in part], tmp_path / f"{ranks}-{number}")
            for case, outcome in zip(part, found, strict=True):
                margins = first_margins(outcome.tokens, alone[case.kind], run_of(case.kind, tmp_path).seed)
                if margins and max(margins) < NEAR:
                    near[case.seed] = margins
                elif faults := differences(outcome, alone[case.kind], case.plan.workload.minibatches):
                    wrong[case.seed] = faults
    assert not wrong
    if near:
        print(f"plans that differ where rounding decides, and by what margins: {near}")
    assert len(near) <= 1 + count // 200


def test_a_difference_is_excused_by_the_margin_of_its_token(tmp_path: Path) -> None:
    kind = Kind("remax", "llama")
    (alone,) = play([(kind, plan_alone(kind))], tmp_path)
    assert len(alone.margins) > len(alone.tokens) and not first_margins(alone.tokens, alone, 0)
    for name, (iteration, row) in {"sequences": (0, 3), "sequences_greedy": (1, 2)}.items():
        prompt, response = alone.tokens[iteration, row, name]
        changed = alone.tokens | {(iteration, row, name): (prompt, [*response[:-1], response[-1] + 1])}
        (margin,) = first_margins(changed, alone, run_of(kind, tmp_path).seed)
        assert margin in alone.margins.values()
        shorter = alone.tokens | {(iteration, row, name): (prompt, response[:-1])}
        assert first_margins(shorter, alone, run_of(kind, tmp_path).seed) == [inf]


def assert_long_tail(lengths: Sequence[int]) -> None:
    """The longest is several times the mean; given responses are not watched."""
    assert not lengths or max(lengths) > 2.5 * sum(lengths) / len(lengths), lengths


def _parts(cases: Sequence[RandomPlan], most: int = 25) -> list[Sequence[RandomPlan]]:
    return [cases[at : at + most] for at in range(0, len(cases), most)]
