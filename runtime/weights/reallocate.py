"""Reallocation executed: the transfers of `plans.reallocation` as fused messages between ranks.

Both sides compute the same messages from the two layouts, so nothing is negotiated. What travels from one rank to
another in a round is one stream of slices, cut into chunks; the chunks of all streams advance in waves of which two
are in flight, which bounds the buffers and cannot deadlock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plans.layout import Layout, Parameter, fraction, model_units
from plans.reallocation import Piece, Reallocation, reallocation

CHUNK_BYTES = 32 * 2**20
Shards = Mapping[str, Tensor]
Chunk = list[Tensor]


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes that this rank sent and received."""

    sent: int
    received: int


@dataclass(frozen=True, slots=True)
class _Messages:
    """This rank's part of one round: peer -> pieces, in an order both sides share."""

    sends: Mapping[int, tuple[Piece, ...]]
    receives: Mapping[int, tuple[Piece, ...]]


class Reallocator:
    """Moves weights between layouts; plans every pair of layouts once."""

    def __init__(self, gpus_per_node: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._gpus_per_node = gpus_per_node
        self._chunk_bytes = chunk_bytes
        self._plans: dict[tuple[Layout, Layout], Reallocation] = {}

    def plan(self, source: Layout, target: Layout) -> Reallocation:
        """The transfers between two layouts, computed once."""
        key = (source, target)
        if key not in self._plans:
            self._plans[key] = reallocation(source, target, self._gpus_per_node)
        return self._plans[key]

    @torch.no_grad()
    def run(self, source: Layout, target: Layout, have: Shards, want: Shards) -> Moved:
        """Fill `want` (this rank's slices in `target`, by parameter name) from `have` (in `source`) of all ranks.

        Every rank of either layout calls this; a rank outside one of them passes an empty mapping for it. All shards
        have one type and lie on one kind of device.
        """
        plan, rank = self.plan(source, target), dist.get_rank()
        mine = _Side(source, rank, plan.grid, have)
        theirs = _Side(target, rank, plan.grid, want)
        for owner, piece in plan.local:
            if owner == rank:
                for old, new in zip(mine.views(piece), theirs.views(piece), strict=True):
                    new.copy_(old)
        sent = received = 0
        for turn in (0, 1):
            messages = _messages(plan, rank, turn)
            origin = theirs if turn else mine
            out = {peer: self._chunks(origin, pieces) for peer, pieces in messages.sends.items()}
            into = {peer: self._chunks(theirs, pieces) for peer, pieces in messages.receives.items()}
            moved = _exchange(out, into)
            sent, received = sent + moved.sent, received + moved.received
        return Moved(sent, received)

    def _chunks(self, side: _Side, pieces: tuple[Piece, ...]) -> Iterator[Chunk]:
        """The slices of a stream, grouped into chunks of at most `chunk_bytes`."""
        limit = self._chunk_bytes // side.element_size
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


class _Side:
    """One rank's slices of a model in a layout; finds the elements of a piece in them."""

    def __init__(self, layout: Layout, rank: int, grid: int, shards: Shards) -> None:
        self._shards = shards
        self._units = {unit.name: unit for unit in model_units(layout.spec)}
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


def _messages(plan: Reallocation, rank: int, turn: int) -> _Messages:
    sends: dict[int, list[Piece]] = {}
    receives: dict[int, list[Piece]] = {}
    for transfer in plan.moves:
        if transfer.round != turn:
            continue
        if transfer.source == rank:
            sends.setdefault(transfer.target, []).append(transfer.piece)
        if transfer.target == rank:
            receives.setdefault(transfer.source, []).append(transfer.piece)
    return _Messages(
        {peer: tuple(pieces) for peer, pieces in sends.items()},
        {peer: tuple(pieces) for peer, pieces in receives.items()},
    )


def _cut(view: Tensor, limit: int) -> Iterator[Tensor]:
    """Parts of at most `limit` elements, cut along the outer dimensions."""
    if view.numel() <= limit or view.dim() == 0:
        yield view
    elif view.shape[0] == 1:
        yield from _cut(view[0], limit)
    else:
        for part in torch.split(view, max(1, limit // prod(view.shape[1:]))):
            yield from _cut(part, limit)


def _exchange(out: Mapping[int, Iterator[Chunk]], into: Mapping[int, Iterator[Chunk]]) -> Moved:
    """Send and receive all streams in waves; wave w + 1 is on its way while wave w is unpacked."""
    nothing: dict[int, Chunk] = {}
    sent = received = 0
    before: _Wave | None = None
    for sends, receives in zip_longest(_waves(out), _waves(into), fillvalue=nothing):
        wave = _Wave(sends, receives)
        sent, received = sent + wave.sent, received + wave.received
        if before is not None:
            before.finish()
        before = wave
    if before is not None:
        before.finish()
    return Moved(sent, received)


def _waves(streams: Mapping[int, Iterator[Chunk]]) -> Iterator[dict[int, Chunk]]:
    for chunks in zip_longest(*streams.values()):
        yield {peer: chunk for peer, chunk in zip(streams, chunks, strict=True) if chunk is not None}


class _Wave:
    """One chunk of every stream, on its way."""

    def __init__(self, sends: Mapping[int, Chunk], receives: Mapping[int, Chunk]) -> None:
        self._incoming = [(chunk, _buffer(chunk), peer) for peer, chunk in sorted(receives.items())]
        self._outgoing = [(_pack(chunk), peer) for peer, chunk in sorted(sends.items())]
        self.sent = sum(buffer.nbytes for buffer, _ in self._outgoing)
        self.received = sum(buffer.nbytes for _, buffer, _ in self._incoming)
        self._works = _post(self._outgoing, [(buffer, peer) for _, buffer, peer in self._incoming])

    def finish(self) -> None:
        """Wait and unpack."""
        for work in self._works:
            work.wait()
        for chunk, buffer, _ in self._incoming:
            for view, part in zip(chunk, torch.split(buffer, [view.numel() for view in chunk]), strict=True):
                view.copy_(part.view(view.shape))


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


def _pack(chunk: Chunk) -> Tensor:
    return torch.cat([view.reshape(-1) for view in chunk])


def _buffer(chunk: Chunk) -> Tensor:
    return chunk[0].new_empty(sum(view.numel() for view in chunk))
