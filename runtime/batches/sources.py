"""What a data set gives to calls: prompts to continue, or examples, which are prompts with given responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from zlib import crc32

import torch

from plans.workload import Workload
from runtime.batches.data import prompt_tokens_of, response_tokens_of
from runtime.batches.datasets import DataSet
from runtime.batches.tokenizer import Tokenizer
from runtime.sequences import Sequences


class Prompts(Protocol):
    """Prompts of an iteration, the same on every rank that asks."""

    def tokens(self, iteration: int, prompts: Sequence[int]) -> Sequences:
        """The numbered prompts of an iteration, without responses."""

    def asked(self, iteration: int, prompts: Sequence[int]) -> list[str] | None:
        """What a person asked in them; None where there is no text."""

    def columns(self, iteration: int, prompts: Sequence[int]) -> dict[str, list[Any]]:
        """What the data hold beside them, by column."""


class Examples(Protocol):
    """Prompts with responses, the same on every rank that asks."""

    def sequences(self, iteration: int, samples: Sequence[int]) -> Sequences:
        """The numbered samples of an iteration, as generation makes them; i belongs to prompt i // group_size."""


@dataclass(frozen=True)
class TextPrompts:
    """Prompts of a data set."""

    data: DataSet
    tokenizer: Tokenizer
    prompt_tokens: int

    def tokens(self, iteration: int, prompts: Sequence[int]) -> Sequences:
        texts = self.data.prompts.texts(iteration)
        chosen = [texts[i] for i in prompts]
        return Sequences.of(prompt_tokens_of(chosen, self.tokenizer, self.prompt_tokens, special=self.data.special))

    def asked(self, iteration: int, prompts: Sequence[int]) -> list[str]:
        order = self.data.prompts.batch(iteration)
        return [self.data.asked[order[i]] for i in prompts]

    def columns(self, iteration: int, prompts: Sequence[int]) -> dict[str, list[Any]]:
        order = self.data.prompts.batch(iteration)
        return {name: [values[order[i]] for i in prompts] for name, values in self.data.columns.items()}


@dataclass(frozen=True)
class HeldOutPrompts:
    """Prompts of evaluations in their order: `samples` of them in each pass. The last pass is filled up with prompts
    that do not count."""

    data: DataSet
    tokenizer: Tokenizer
    prompt_tokens: int
    samples: int

    @property
    def count(self) -> int:
        """Prompts of an evaluation."""
        return len(self.data.asked)

    @property
    def passes(self) -> int:
        """Passes of an evaluation."""
        return -(-self.count // self.samples)

    def holds(self, iteration: int, number: int) -> bool:
        """Whether a pass has a prompt for a sample."""
        return iteration * self.samples + number < self.count

    def tokens(self, iteration: int, prompts: Sequence[int]) -> Sequences:
        texts = [self.data.prompts.prompts[i] for i in self._places(iteration, prompts)]
        return Sequences.of(prompt_tokens_of(texts, self.tokenizer, self.prompt_tokens, special=self.data.special))

    def asked(self, iteration: int, prompts: Sequence[int]) -> list[str]:
        return [self.data.asked[i] for i in self._places(iteration, prompts)]

    def columns(self, iteration: int, prompts: Sequence[int]) -> dict[str, list[Any]]:
        places = self._places(iteration, prompts)
        return {name: [values[i] for i in places] for name, values in self.data.columns.items()}

    def _places(self, iteration: int, numbers: Sequence[int]) -> list[int]:
        return [min(iteration * self.samples + number, self.count - 1) for number in numbers]


@dataclass(frozen=True)
class TextExamples:
    """Prompts of a data set, each with its responses: one, or the chosen and the rejected. `stop`: a response ends with
    the stop token where it fits."""

    data: DataSet
    tokenizer: Tokenizer
    prompt_tokens: int
    response_tokens: int
    stop: bool

    def sequences(self, iteration: int, samples: Sequence[int]) -> Sequences:
        order, group = self.data.prompts.batch(iteration), len(self.data.responses[0])
        chosen = [order[sample // group] for sample in samples]
        prompts = [self.data.prompts.prompts[index] for index in chosen]
        texts = [self.data.responses[index][sample % group] for index, sample in zip(chosen, samples, strict=True)]
        return Sequences.of(
            prompt_tokens_of(prompts, self.tokenizer, self.prompt_tokens, special=self.data.special),
            response_tokens_of(texts, self.tokenizer, self.response_tokens, stop=self.stop),
        )


@dataclass(frozen=True)
class RandomPrompts:
    """Prompts of random tokens, for benchmarks with random weights. Their lengths, and those of the responses, which
    nothing else would end, are drawn from the distributions of the workload."""

    vocab: int
    workload: Workload
    seed: int

    def tokens(self, iteration: int, prompts: Sequence[int]) -> Sequences:
        lengths = self._drawn(iteration)
        group = self.workload.group_size
        return Sequences.of([self.row(iteration, number, lengths[number * group][0]) for number in prompts])

    def asked(self, iteration: int, prompts: Sequence[int]) -> None:
        return None

    def columns(self, iteration: int, prompts: Sequence[int]) -> dict[str, list[Any]]:
        return {}

    def limits(self, iteration: int, samples: Sequence[int]) -> list[int]:
        """Response tokens of the numbered samples of an iteration."""
        lengths = self._drawn(iteration)
        return [lengths[sample][1] for sample in samples]

    def _drawn(self, iteration: int) -> tuple[tuple[int, int], ...]:
        return self.workload.sample_lengths(crc32(f"{self.seed}/{iteration}".encode()))

    def row(self, iteration: int, number: int, length: int) -> list[int]:
        """Random tokens by number."""
        generator = torch.Generator().manual_seed(crc32(f"{self.seed}/{iteration}/{number}".encode()))
        return list(torch.randint(self.vocab, (length,), generator=generator).tolist())


@dataclass(frozen=True)
class RandomExamples:
    """Examples of random tokens, of the same lengths as `RandomPrompts` and its responses."""

    vocab: int
    workload: Workload
    seed: int

    def sequences(self, iteration: int, samples: Sequence[int]) -> Sequences:
        prompts, group = RandomPrompts(self.vocab, self.workload, self.seed), self.workload.group_size
        given = [ids for ids, _ in prompts.tokens(iteration, [sample // group for sample in samples]).texts()]
        # Numbers from the batch on are of responses, so that they are not those of the prompts.
        first = self.workload.batch_size
        limits = prompts.limits(iteration, samples)
        rows = [prompts.row(iteration, first + i, n) for i, n in zip(samples, limits, strict=True)]
        return Sequences.of(given, rows)
