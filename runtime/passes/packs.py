"""Packs: the sequences of one micro-batch laid end to end, as a model reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from runtime.batches.sequences import Sequences, take_runs
from runtime.models.model import Model
from runtime.models.packed_attention import Runs


@dataclass(frozen=True)
class Batch:
    """Samples and what a loss reads of them: numbers per response token, each [response tokens] (`Sequences`)."""

    sequences: Sequences
    fields: Mapping[str, Tensor]

    def take(self, samples: Sequence[int]) -> Batch:
        """Some samples, in the order given."""
        lengths = self.sequences.responses
        taken = {name: take_runs(values, lengths, samples) for name, values in self.fields.items()}
        return Batch(self.sequences.take(samples), taken)

    def __getitem__(self, name: str) -> Tensor:
        """The numbers of that name."""
        return self.fields[name]


@dataclass(frozen=True)
class Pack:
    """Sequences of a micro-batch, filled up to a width by tokens that nothing reads.

    tokens: int64 [width]. runs: lengths of the sequences, the filling a last one. positions: number of each token in
    its own sequence. sequences: what the pack holds; their places are those of the pack.
    """

    sequences: Sequences
    tokens: Tensor
    positions: Tensor
    runs: Runs

    @property
    def before(self) -> Tensor:
        """Places where the response tokens are predicted."""
        return self.sequences.of_response - 1


def pack(sequences: Sequences, width: int) -> Pack:
    """Lay sequences end to end; `width` is at least their tokens."""
    empty = width - len(sequences.tokens)
    assert empty >= 0, f"{len(sequences.tokens)} tokens in a pack of {width}"
    lengths = (*sequences.lengths, empty) if empty else sequences.lengths
    return Pack(
        sequences,
        F.pad(sequences.tokens, (0, empty)),
        F.pad(sequences.positions, (0, empty)),
        Runs.of(lengths, sequences.tokens.device),
    )


def packs_of(model: Model, parts: Sequence[Sequences]) -> list[Pack]:
    """A pack for every micro-batch. Tokens are cut over tp under sequence parallelism, so widths are multiples of it;
    a pipeline, whose messages have a fixed shape, gives all packs the width of the fullest."""
    multiple = model.layout.tp if model.config.sequence_parallel else 1
    widths = [max(1, -(-len(part.tokens) // multiple)) * multiple for part in parts]
    if model.layout.pp > 1:
        widths = [max(widths)] * len(widths)
    return [pack(part.to(model.device), width) for part, width in zip(parts, widths, strict=True)]
