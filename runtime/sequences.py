"""Samples of different lengths laid end to end: what every call hands on, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sequences:
    """Prompts with their responses, one sample after the other.

    tokens: int64 [all tokens], for each sample its prompt and then its response. prompts, responses: how many tokens
    the prompt (at least 1) and the response (0 or more) of each sample have, in host memory. Numbers per response token
    travel beside it as tensors [all response tokens] in the same order.
    """

    tokens: Tensor
    prompts: tuple[int, ...]
    responses: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.prompts) == len(self.responses), f"{len(self.prompts)} prompts, {len(self.responses)} responses"
        assert min(self.prompts, default=1) >= 1, "a prompt has no token"
        assert min(self.responses, default=0) >= 0, f"a response of {min(self.responses)} tokens"
        assert self.tokens.shape == (sum(self.lengths),), f"{tuple(self.tokens.shape)} tokens, not {sum(self.lengths)}"

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]] | None = None) -> Sequences:
        """From token ids per sample; without responses, prompts to continue."""
        after: Sequence[Sequence[int]] = responses if responses is not None else [()] * len(prompts)
        ids = [token for pair in zip(prompts, after, strict=True) for part in pair for token in part]
        return cls(torch.tensor(ids, dtype=torch.int64), tuple(map(len, prompts)), tuple(map(len, after)))

    def __len__(self) -> int:
        """Samples."""
        return len(self.prompts)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample."""
        return tuple(p + r for p, r in zip(self.prompts, self.responses, strict=True))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each sample begins in `tokens`; and the end."""
        return (0, *accumulate(self.lengths))

    @cached_property
    def of_response(self) -> Tensor:
        """Places of the response tokens in `tokens`: int64 [all response tokens]. The place before one is where a model
        predicts it, which is there because no prompt is empty."""
        begins = [start + prompt for start, prompt in zip(self.starts, self.prompts, strict=False)]
        return ranges(begins, self.responses).to(self.tokens.device)

    @cached_property
    def mask(self) -> Tensor:
        """True at response tokens: bool [all tokens]."""
        return torch.zeros_like(self.tokens, dtype=torch.bool).index_fill_(0, self.of_response, True)

    @cached_property
    def last(self) -> Tensor:
        """Place of the last token of each sample: int64 [samples]."""
        return torch.tensor(self.starts[1:], dtype=torch.int64, device=self.tokens.device) - 1

    @cached_property
    def positions(self) -> Tensor:
        """Number of each token in its own sample, from 0: int64 [all tokens]."""
        return ranges([0] * len(self), self.lengths).to(self.tokens.device)

    def take(self, samples: Sequence[int]) -> Sequences:
        """Some samples, in the order given."""
        places = ranges([self.starts[i] for i in samples], [self.lengths[i] for i in samples])
        return Sequences(
            self.tokens[places.to(self.tokens.device)],
            tuple(self.prompts[i] for i in samples),
            tuple(self.responses[i] for i in samples),
        )

    def to(self, device: torch.device) -> Sequences:
        """The same on a device."""
        return self if self.tokens.device == device else Sequences(self.tokens.to(device), self.prompts, self.responses)

    def texts(self) -> list[tuple[list[int], list[int]]]:
        """Token ids of the prompt and of the response of each sample."""
        ids = self.tokens.tolist()
        parts = zip(self.starts, self.prompts, self.lengths, strict=False)
        return [(ids[at : at + prompt], ids[at + prompt : at + length]) for at, prompt, length in parts]


def ranges(starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """start, start + 1, ... of every run, end to end: int64 [sum of lengths], in host memory."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    shifts = torch.tensor(starts, dtype=torch.int64) - (counts.cumsum(0) - counts)
    return torch.arange(int(counts.sum())) + shifts.repeat_interleave(counts)


def take_runs(values: Tensor, lengths: Sequence[int], samples: Sequence[int]) -> Tensor:
    """The runs of some samples, in the order given, out of all samples' runs [sum of lengths]."""
    starts = (0, *accumulate(lengths))
    places = ranges([starts[i] for i in samples], [lengths[i] for i in samples])
    return values[places.to(values.device)]


def padded(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Runs [sum of lengths] as rows [samples, longest, at least 1], filled up with zeros on the right."""
    width = max(1, *lengths, 1)
    rows = values.new_zeros(len(lengths) * width)
    rows[ranges([i * width for i in range(len(lengths))], lengths).to(values.device)] = values
    return rows.view(len(lengths), width)


def run_sums(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """The sum of each run: [samples]."""
    samples = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    return values.new_zeros(len(lengths)).index_add(0, samples.to(values.device), values)


def unpadded(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Undo `padded`: the first `lengths` numbers of each row, end to end."""
    places = ranges([i * rows.shape[1] for i in range(len(lengths))], lengths)
    return rows.reshape(-1)[places.to(rows.device)]
