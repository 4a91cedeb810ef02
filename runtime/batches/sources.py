"""What a data set gives to calls: prompts to continue, or examples, which are prompts with given responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from zlib import crc32

import torch
from torch import Tensor

from runtime.batches.data import PromptSet, left_padded, right_padded
from runtime.batches.tokenizer import Tokenizer
from runtime.batches.transfer import Rows


class Prompts(Protocol):
    """Prompts of an iteration, the same on every rank that asks."""

    def tokens(self, iteration: int, prompts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Token ids [n, prompt_tokens] of the numbered prompts of an iteration, padded on the left; lengths [n]."""


class Examples(Protocol):
    """Prompts with responses, the same on every rank that asks."""

    def sequences(self, iteration: int, samples: Sequence[int]) -> Rows:
        """The numbered samples of an iteration, as generation makes them: `tokens` [n, prompt_tokens +
        response_tokens], `prompt_lengths` and `response_lengths` [n]. Sample i belongs to prompt i // group_size."""


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
class TextExamples:
    """Prompts of a data set, each with its responses: one, or the chosen and the rejected. `stop`: a response ends with
    the stop token where it fits."""

    prompts: PromptSet
    responses: tuple[tuple[str, ...], ...]
    tokenizer: Tokenizer
    prompt_tokens: int
    response_tokens: int
    stop: bool

    def sequences(self, iteration: int, samples: Sequence[int]) -> Rows:
        order, group = self.prompts.batch(iteration), len(self.responses[0])
        chosen = [order[sample // group] for sample in samples]
        prompts, prompt_lengths = left_padded(
            [self.prompts.prompts[index] for index in chosen], self.tokenizer, self.prompt_tokens
        )
        texts = [self.responses[index][sample % group] for index, sample in zip(chosen, samples, strict=True)]
        responses, response_lengths = right_padded(texts, self.tokenizer, self.response_tokens, stop=self.stop)
        tokens = torch.cat([prompts, responses], dim=1)
        return {"tokens": tokens, "prompt_lengths": prompt_lengths, "response_lengths": response_lengths}


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
class RandomExamples:
    """Full-length examples of random tokens, for benchmarks with random weights."""

    vocab: int
    prompt_tokens: int
    response_tokens: int
    seed: int

    def sequences(self, iteration: int, samples: Sequence[int]) -> Rows:
        width = self.prompt_tokens + self.response_tokens
        tokens, lengths = RandomPrompts(self.vocab, width, self.seed).tokens(iteration, samples)
        prompts = torch.full_like(lengths, self.prompt_tokens)
        return {"tokens": tokens, "prompt_lengths": prompts, "response_lengths": lengths - prompts}
