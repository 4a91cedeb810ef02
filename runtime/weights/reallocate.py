"""Reallocation executed: the transfers of `plans.reallocation` as messages between ranks.

Both sides compute the same messages from the two layouts, so nothing is negotiated. What travels from one rank to
another in a round of a step is one stream of slices, cut into chunks; the chunks of all streams advance in waves of
which two are in flight. This cannot deadlock: all ranks have the steps, and the waves of a step, in the same order. The
streams of a rank share what a wave may hold, so that buffers are bounded however many peers there are. Large slices go
from and to their places in the weights without a buffer where they lie in one piece; small ones are fused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plans.layout import Layout, Parameter, Unit, fraction, trained_units
from plans.reallocation import WAVE_BYTES, Piece, Reallocation, busiest, reallocation

DIRECT_BYTES = 2**20
"""Slices from here on are messages of their own."""
Shards = Mapping[str, Tensor]
Chunk = list[Tensor]
Stream = tuple[int, int]
"""The rank on the other side, and the round."""
Streams = Mapping[Stream, Iterator[Chunk]]
_NOTHING: dict[Stream, Chunk] = {}


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes that this rank sent and received."""

    sent: int
    received: int


class Reallocator:
    """Moves weights between layouts; plans every pair of layouts once."""

    def __init__(self, gpus_per_node: int, wave_bytes: int = WAVE_BYTES) -> None:
        self._gpus_per_node = gpus_per_node
        self._wave_bytes = wave_bytes
        self._plans: dict[tuple[Layout, Layout], Reallocation] = {}

    def plan(self, source: Layout, target: Layout) -> Reallocation:
        """The transfers between two layouts, computed once."""
        key = (source, target)
        if key not in self._plans:
            self._plans[key] = reallocation(source, target, self._gpus_per_node)
        return self._plans[key]

    def run(self, source: Layout, target: Layout, have: Shards, want: Shards) -> Moved:
        """Fill `want` (this rank's slices in `target`, by parameter name) from `have` (in `source`) of all ranks.

        Every rank of either layout calls this; a rank outside one of them passes an empty mapping for it. All shards
        have one type and lie on one kind of device.
        """
        return self._move(self.plan(source, target), source, target, have, want)

    @torch.no_grad()
    def mix(self, source: Layout, target: Layout, have: Shards, held: Shards, share: float) -> None:
        """Make `held` share x the source's weights + (1 - share) x its own, in float32; else as `run`.

        Goes through the model in runs of units that are no larger than its largest one, so that only that much is
        there twice.
        """
        plan, units = self.plan(source, target), trained_units(target.spec)
        most = max(unit.size for unit in units)
        for some in _runs(units, most):
            names = [p.name for unit in some for p in unit.parameters if p.name in held]
            new = {name: torch.empty_like(held[name]) for name in names}
            self._move(plan.among({unit.name for unit in some}), source, target, have, new)
            for name, theirs in new.items():
                held[name].copy_(torch.lerp(held[name].float(), theirs.float(), share))

    @torch.no_grad()
    def _move(self, plan: Reallocation, source: Layout, target: Layout, have: Shards, want: Shards) -> Moved:
        rank = dist.get_rank()
        mine = _Side(source, rank, plan.grid, have)
        theirs = _Side(target, rank, plan.grid, want)
        for owner, piece in plan.local:
            if owner == rank:
                for old, new in zip(mine.views(piece), theirs.views(piece), strict=True):
                    new.copy_(old)
        steps = []
        for streams in plan.steps({unit.name: unit.size for unit in trained_units(target.spec)}):
            parts = busiest(streams)
            out, into = {}, {}
            for stream, pieces in streams.items():
                giver, taker, turn = stream
                if giver == rank:
                    out[taker, turn] = self._chunks(theirs if turn else mine, pieces, parts[stream])
                elif taker == rank:
                    into[giver, turn] = self._chunks(theirs, pieces, parts[stream])
            steps.append((out, into))
        return _exchange(steps)

    def _chunks(self, side: _Side, pieces: tuple[Piece, ...], parts: int) -> Iterator[Chunk]:
        """The slices of a stream, grouped into chunks of at most one of `parts` equal parts of a wave."""
        limit = max(1, self._wave_bytes // (side.element_size * parts))
        chunk: Chunk = []
        size = 0
        for view in (part for piece in pieces for whole in side.views(piece) for part in _cut(whole, limit)):
            if chunk and size + view.numel() > limit:
                yield chunk
                chunk, size = [], 0
            chunk.append(view)
            size += view.numel()
        if chunk:
            yield chunk


def _runs(units: Sequence[Unit], most: int) -> Iterator[list[Unit]]:
    """Runs of units with at most `most` elements, or of a single one."""
    run: list[Unit] = []
    for unit in units:
        if run and sum(one.size for one in run) + unit.size > most:
            yield run
            run = []
        run.append(unit)
    if run:
        yield run


class _Side:
    """One rank's slices of a model in a layout; finds the elements of a piece in them."""

    def __init__(self, layout: Layout, rank: int, grid: int, shards: Shards) -> None:
        self._shards = shards
        self._units = {unit.name: unit for unit in trained_units(layout.spec)}
        self._grid = grid
        self._tp = layout.tp
        self._first = fraction(layout, rank, grid)[0] if rank in layout.places else 0
        self.element_size = next((s.element_size() for s in shards.values()), 1)

    def views(self, piece: Piece) -> Iterator[Tensor]:
        """The elements of a piece in every parameter of its unit, of the same shapes on all ranks."""
        for parameter in self._units[piece.unit].parameters:
            shard = self._shards[parameter.name] if self._holds(parameter, piece) else None
            if shard is not None:
                yield shard if parameter.axis is None else self._slice(parameter, shard, piece)

    @staticmethod
    def _holds(parameter: Parameter, piece: Piece) -> bool:
        return piece.replicated if parameter.axis is None else piece.stop > piece.start

    def _slice(self, parameter: Parameter, shard: Tensor, piece: Piece) -> Tensor:
        axis = parameter.axis
        assert axis is not None
        step = shard.shape[axis] // parameter.blocks * self._tp // self._grid
        shape = shard.shape
        blocks = shard.view(*shape[:axis], parameter.blocks, -1, *shape[axis + 1 :])
        return blocks.narrow(axis + 1, (piece.start - self._first) * step, (piece.stop - piece.start) * step)


def _cut(view: Tensor, limit: int) -> Iterator[Tensor]:
    """Parts of at most `limit` elements, cut along the outer dimensions."""
    if view.numel() <= limit or view.dim() == 0:
        yield view
    elif view.shape[0] == 1:
        yield from _cut(view[0], limit)
    else:
        for part in torch.split(view, max(1, limit // prod(view.shape[1:]))):
            yield from _cut(part, limit)


def _exchange(steps: Sequence[tuple[Streams, Streams]]) -> Moved:
    """Send and receive the streams of all steps in waves; wave w + 1 is on its way while wave w is unpacked.

    A step has a wave on every rank, if an empty one, so that what came in a step is unpacked two steps later."""
    sent = received = 0
    before = _Wave({}, {})
    for out, into in steps:
        for sends, receives in zip_longest(_waves(out), _waves(into), fillvalue=_NOTHING):
            wave = _Wave(sends, receives)
            sent, received = sent + wave.sent, received + wave.received
            before.finish()
            before = wave
    before.finish()
    return Moved(sent, received)


def _waves(streams: Streams) -> Iterator[dict[Stream, Chunk]]:
    if not streams:
        yield _NOTHING
    for chunks in zip_longest(*streams.values()):
        yield {stream: chunk for stream, chunk in zip(streams, chunks, strict=True) if chunk is not None}


class _Wave:
    """One chunk of every stream, on its way."""

    def __init__(self, sends: Mapping[Stream, Chunk], receives: Mapping[Stream, Chunk]) -> None:
        taken, given = sorted(receives), sorted(sends)  # two streams between the same ranks: alike on both
        self._incoming = [(part, _room(part), peer) for peer, turn in taken for part in _fused(receives[peer, turn])]
        self._outgoing = [(_packed(part), peer) for peer, turn in given for part in _fused(sends[peer, turn])]
        self.sent = sum(buffer.nbytes for buffer, _ in self._outgoing)
        self.received = sum(buffer.nbytes for _, buffer, _ in self._incoming)
        self._works = _post(self._outgoing, [(buffer, peer) for _, buffer, peer in self._incoming])

    def finish(self) -> None:
        """Wait, and unpack what did not come to its place."""
        for work in self._works:
            work.wait()
        for part, buffer, _ in self._incoming:
            if buffer is not part[0]:
                for view, values in zip(part, torch.split(buffer, [view.numel() for view in part]), strict=True):
                    view.copy_(values.view(view.shape))


def _fused(chunk: Chunk) -> Iterator[Chunk]:
    """The slices of a chunk by messages: large ones alone, then all others together."""
    yield from ([view] for view in chunk if view.nbytes >= DIRECT_BYTES)
    if small := [view for view in chunk if view.nbytes < DIRECT_BYTES]:
        yield small


def _post(sends: Iterable[tuple[Tensor, int]], receives: Iterable[tuple[Tensor, int]]) -> list[Any]:
    """Start all operations (buffer, peer) of a wave; the works to wait for. NCCL needs them as one batch, because two
    ranks that send to each other would otherwise wait for each other."""
    operations = [dist.P2POp(dist.irecv, buffer, peer) for buffer, peer in receives]
    operations += [dist.P2POp(dist.isend, buffer, peer) for buffer, peer in sends]
    if not operations:
        return []
    if operations[0].tensor.device.type == "cuda":
        return list(dist.batch_isend_irecv(operations))
    return [operation.op(operation.tensor, operation.peer) for operation in operations]


def _packed(part: Chunk) -> Tensor:
    """The slices of a message as one; the only one itself where it lies in one piece."""
    if len(part) == 1 and part[0].is_contiguous():
        return part[0]
    return torch.cat([view.reshape(-1) for view in part])


def _room(part: Chunk) -> Tensor:
    """Where a message is received: its place in the weights, or a buffer."""
    if len(part) == 1 and part[0].is_contiguous():
        return part[0]
    return part[0].new_empty(sum(view.numel() for view in part))
