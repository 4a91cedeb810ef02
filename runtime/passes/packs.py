"""Packs: the sequences of one micro-batch laid end to end, as a model reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.models.context_parallel import CutRuns, own_places
from runtime.models.model import Model
from runtime.models.packed_attention import ReplayedTokens, RoutedTokens, Runs
from runtime.models.routing import Balance
from runtime.routes import Routes, route_type
from runtime.sequences import Sequences, ranges, take_runs


@dataclass(frozen=True)
class Batch:
    """Samples and what a loss reads of them: numbers per response token, each [response tokens] (`Sequences`). routes:
    the experts that their tokens have to visit, None where routers choose."""

    sequences: Sequences
    fields: Mapping[str, Tensor]
    routes: Routes | None = None

    def take(self, samples: Sequence[int]) -> Batch:
        """Some samples, in the order given."""
        lengths = self.sequences.responses
        taken = {name: take_runs(values, lengths, samples) for name, values in self.fields.items()}
        return Batch(self.sequences.take(samples), taken, self.routes and self.routes.take(samples))

    def __getitem__(self, name: str) -> Tensor:
        """The numbers of that name."""
        return self.fields[name]


@dataclass(frozen=True)
class Pack:
    """Sequences of a micro-batch, filled up to a width by tokens that nothing reads; this rank's part of it.

    sequences: what the whole pack holds; their places are those of the pack. runs: lengths of the sequences, the
    filling a last one; segments of them under context parallelism. tokens: int64 [width / cp]. positions: number of
    each token in its own sequence. number: which of this rank's tokens stands at each place of the whole pack, -1 for
    those of other ranks; None without context parallelism.
    """

    sequences: Sequences
    tokens: Tensor
    positions: Tensor
    runs: Runs | CutRuns
    number: Tensor | None = None

    @property
    def width(self) -> int:
        """Tokens of the whole pack, with the filling."""
        return len(self.tokens) if self.number is None else len(self.number)

    @property
    def before(self) -> Tensor:
        """Places where the response tokens are predicted."""
        return self.sequences.of_response - 1

    @property
    def own(self) -> Tensor:
        """Places in the whole pack of this rank's tokens, in its order."""
        if self.number is None:
            return torch.arange(len(self.tokens), device=self.tokens.device)
        held = (self.number >= 0).nonzero().flatten()
        return held[self.number[held].argsort()]

    def held(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Of places of the whole pack, the numbers of those that this rank has, and where they are in `tokens`."""
        if self.number is None:
            return torch.arange(len(places), device=places.device), places
        found = self.number[places]
        numbers = (found >= 0).nonzero().flatten()
        return numbers, found[numbers]


def pack(sequences: Sequences, width: int, cp: int = 1, rank: int = 0) -> Pack:
    """Lay sequences end to end; `width` is at least their tokens. The part of a `rank` of `cp`."""
    empty, device = width - len(sequences.tokens), sequences.tokens.device
    assert empty >= 0, f"{len(sequences.tokens)} tokens in a pack of {width}"
    lengths = (*sequences.lengths, empty) if empty else sequences.lengths
    tokens, positions = F.pad(sequences.tokens, (0, empty)), F.pad(sequences.positions, (0, empty))
    if cp == 1:
        return Pack(sequences, tokens, positions, Runs.of(lengths, device))
    own = own_places(width, cp, rank, device)
    number = own.new_full((width,), -1).index_copy(0, own, torch.arange(len(own), device=device))
    return Pack(sequences, tokens[own], positions[own], CutRuns.of(lengths, cp, rank, device), number)


def packs_of(model: Model, parts: Sequence[Sequences]) -> list[Pack]:
    """A pack for every micro-batch. A pipeline, whose messages have a fixed shape, gives all packs the width of the
    fullest."""
    cp = model.layout.cp
    multiple = width_multiple(model.layout.tp if model.config.sequence_parallel else 1, cp)
    widths = [max(1, -(-len(part.tokens) // multiple)) * multiple for part in parts]
    if model.layout.pp > 1:
        widths = [max(widths)] * len(widths)
    return [pack(part.to(model.device), width, cp, model.place.cp) for part, width in zip(parts, widths, strict=True)]


def width_multiple(tp: int, cp: int) -> int:
    """What the width of a pack is a multiple of, whose tokens context parallelism cuts into 2 cp chunks, two to a rank,
    and sequence parallelism over tp. It is tp that cuts what a cp rank has, width / cp: lcm(tp, 2 cp) would leave 2
    tokens of 4 to each of 4 tp ranks at cp 2."""
    return tp if cp == 1 else cp * lcm(2, tp)


def balanced(pack: Pack, samples: Sequence[int], balance: Balance, layers: int) -> Pack:
    """A pack in which routers balance the experts of each sequence that counts. samples: the numbers of the sequences
    in this replica's part of the minibatch; layers: of the whole model."""
    lengths, device = pack.sequences.lengths, pack.tokens.device
    owners = torch.arange(len(lengths), device=device).repeat_interleave(
        torch.tensor(lengths, dtype=torch.int64, device=device)
    )
    owners = F.pad(owners, (0, pack.width - len(owners)), value=len(lengths))[pack.own]
    counted = [not balance.counts or balance.counts[sample] for sample in samples]
    reals = [float(n) if counts else torch.inf for n, counts in zip(lengths, counted, strict=True)]
    each = torch.tensor([*reals, torch.inf], device=device)
    routed = RoutedTokens(owners, each, balance.coefficient / (balance.samples * layers))
    return replace(pack, runs=replace(pack.runs, routed=routed))


def replayed(pack: Pack, routes: Routes, model: Model) -> Pack:
    """A pack whose tokens visit the experts of their routes in the layers of this rank's stage. The last token of a
    sequence and the filling have none."""
    layout, device = model.layout, pack.tokens.device
    layers = [layer for index in range(layout.vpp) for layer in layout.chunk_layers(model.place.pp, index)]
    places = ranges(pack.sequences.starts[:-1], [len(row) for row in routes.rows]).to(device)
    experts = torch.zeros(
        pack.width, len(layers), model.spec.experts_per_token, dtype=route_type(model.spec), device=device
    )
    known = torch.zeros(pack.width, dtype=torch.bool, device=device)
    if len(places):
        columns = torch.tensor(layers, device=routes.rows[0].device)
        experts.index_copy_(0, places, torch.cat([row.index_select(1, columns) for row in routes.rows]).to(device))
        known.index_fill_(0, places, True)
    found = ReplayedTokens(experts[pack.own], tuple(layer + 1 for layer in layers), known[pack.own])
    return replace(pack, runs=replace(pack.runs, replayed=found))
