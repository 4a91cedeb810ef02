"""Reallocation: the fewest bytes that turn one layout of a model's parameters into another, as explicit moves.

Pure and deterministic: every rank computes the same list from the two layouts and needs no negotiation. Data that
a rank already holds is never sent, nor is the frozen base of a model with adapters, which every copy has from the
start. A slice that several ranks of one node need crosses the network once (round 0) and is relayed inside the node
(round 1); senders are the least loaded holders, same node first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import lcm
from typing import Any

from plans.layout import Layout, Unit, fraction, trained_units

WAVE_BYTES = 64 * 2**20
"""Most that a rank sends in a wave, and receives in one, to and from all its peers together."""
WAVES_IN_FLIGHT = 2
RUNS = 8
"""Into about so many runs units are cut where slices are relayed: the last one is relayed when the network is done."""


def buffer_bytes(moved: Any, wave_bytes: int = WAVE_BYTES) -> Any:
    """Most bytes of buffers on a rank that sends and receives at most `moved` bytes each way: a number, or an array."""
    most = WAVES_IN_FLIGHT * wave_bytes
    return 2.0 * (moved - (moved - most) * (moved > most))


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """A slice of a unit: the fraction [start, stop) / grid of each sharded parameter; with `replicated`, the unit's
    replicated parameters as well. An empty fraction (start == stop) moves the replicated ones alone."""

    unit: str
    start: int
    stop: int
    replicated: bool


@dataclass(frozen=True, slots=True)
class Move:
    """One piece from one rank to another. Round 1 sends what its source received in round 0."""

    source: int
    target: int
    piece: Piece
    elements: int
    round: int = 0


Streams = dict[tuple[int, int, int], tuple[Piece, ...]]
"""(source, target, round) -> the pieces that go from one to the other."""


@dataclass(frozen=True)
class Reallocation:
    """All that a change of layout moves. `local` are pieces a rank keeps: (rank, piece)."""

    grid: int
    local: tuple[tuple[int, Piece], ...]
    moves: tuple[Move, ...]

    @property
    def elements(self) -> int:
        """Elements that cross between ranks."""
        return sum(t.elements for t in self.moves)

    def among(self, units: Collection[str]) -> Reallocation:
        """The same for some units alone."""
        local = tuple((rank, piece) for rank, piece in self.local if piece.unit in units)
        return Reallocation(self.grid, local, tuple(move for move in self.moves if move.piece.unit in units))

    def steps(self, sizes: Mapping[str, int]) -> list[Streams]:
        """What goes from rank to rank in each step, in an order that all know. sizes: elements of every unit.

        Where slices are relayed, units cross the network in runs, one in a step, and a run is relayed two steps later:
        the last of a step is still on its way when the next begins. So nodes relay while the network is busy.
        """
        relayed = any(move.round for move in self.moves)
        moved = {move.piece.unit for move in self.moves}
        wanted = {unit: elements for unit, elements in sizes.items() if unit in moved}
        whole = sum(wanted.values())
        most = max(*wanted.values(), whole // RUNS) if relayed else whole
        run_of: dict[str, int] = {}
        run = size = 0
        for unit, elements in wanted.items():
            if size and size + elements > most:
                run, size = run + 1, 0
            run_of[unit], size = run, size + elements
        found: list[dict[tuple[int, int, int], list[Piece]]] = [defaultdict(list) for _ in range(run + 1 + 2 * relayed)]
        for move in self.moves:
            found[run_of[move.piece.unit] + 2 * move.round][move.source, move.target, move.round].append(move.piece)
        return [{key: tuple(pieces) for key, pieces in step.items()} for step in found]


def busiest(streams: Streams) -> dict[tuple[int, int, int], int]:
    """Stream -> how many its source sends or its target receives, whichever are more: into so many parts the two cut
    what a wave may hold, so that neither holds more."""
    sends, receives = Counter(source for source, *_ in streams), Counter(target for _, target, _ in streams)
    return {stream: max(sends[stream[0]], receives[stream[1]]) for stream in streams}


def _elements(unit: Unit, piece: Piece, grid: int) -> int:
    return unit.sharded * (piece.stop - piece.start) // grid + (unit.replicated if piece.replicated else 0)


def reallocation(source: Layout, target: Layout, gpus_per_node: int) -> Reallocation:
    """Moves that give every rank of `target` its slices out of `source`. Total elements are the minimum: what
    the target ranks hold in `target` and do not hold in `source`."""
    grid = lcm(source.tp, target.tp)
    units = {unit.name: unit for unit in trained_units(target.spec)}
    local: list[tuple[int, Piece]] = []
    needs: dict[Piece, list[int]] = defaultdict(list)
    for name, ranks in target.holders.items():
        if name not in units:  # it is frozen, and lies in every layout from the start
            continue
        holding = set(source.holders[name])
        for rank in ranks:
            kept, missing = _split(source, target, name, rank, grid, rank in holding, bool(units[name].sharded))
            local += [(rank, piece) for piece in kept]
            for piece in missing:
                needs[piece].append(rank)
    moves = _route(source, needs, units, grid, gpus_per_node)
    return Reallocation(grid, tuple(local), tuple(moves))


def _split(
    source: Layout, target: Layout, unit: str, rank: int, grid: int, holds: bool, sharded: bool
) -> tuple[list[Piece], list[Piece]]:
    """What a rank keeps and what it must receive of one unit, cut at the source's tp boundaries."""
    start, stop = fraction(target, rank, grid) if sharded else (0, 0)
    if not sharded:
        piece = Piece(unit, 0, 0, True)
        return ([piece], []) if holds else ([], [piece])
    own = fraction(source, rank, grid) if holds else (0, 0)
    step = grid // source.tp
    cuts = sorted({start, stop, *(c for c in range(0, grid + 1, step) if start < c < stop)})
    kept: list[Piece] = []
    missing: list[Piece] = []
    first = not holds
    for a, b in pairwise(cuts):
        if own[0] <= a and b <= own[1]:
            kept.append(Piece(unit, a, b, False))
        else:
            missing.append(Piece(unit, a, b, first))
            first = False
    if holds:
        kept.append(Piece(unit, 0, 0, True))
    return kept, missing


def _route(
    source: Layout, needs: dict[Piece, list[int]], units: dict[str, Unit], grid: int, per_node: int
) -> list[Move]:
    """Choose senders: the same node before the network, then the least loaded holder, then the lowest rank."""
    sent: dict[int, int] = defaultdict(int)
    moves: list[Move] = []
    for piece in sorted(needs):
        probe = piece.start if piece.stop > piece.start else None
        owners = [r for r in source.holders[piece.unit] if probe is None or _covers(source, r, probe, grid)]
        owner_nodes = {r // per_node for r in owners}
        size = _elements(units[piece.unit], piece, grid)
        relay: dict[int, list[int]] = {}
        for rank in sorted(needs[piece], key=lambda r: (sent[r], r)):
            node = rank // per_node
            if node in owner_nodes:
                candidates, turn = [r for r in owners if r // per_node == node], 0
            elif node in relay:
                candidates, turn = relay[node], 1
            else:
                candidates, turn = owners, 0
                relay[node] = [rank]
            sender = min(candidates, key=lambda r: (sent[r], r))
            sent[sender] += size
            moves.append(Move(sender, rank, piece, size, turn))
    return moves


def _covers(layout: Layout, rank: int, at: int, grid: int) -> bool:
    start, stop = fraction(layout, rank, grid)
    return start <= at < stop
