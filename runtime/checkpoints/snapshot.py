"""Host copies of a rank's part of the training state, so that training can go on while they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from plans.checkpoint import Entry, written
from plans.checkpoint_files import MASTER, MASTER_BYTES, MOMENTS, RoleState, StoredEntry
from plans.layout import Layout
from runtime.checkpoints.direct import large_pages
from runtime.checkpoints.folder import rank_file
from runtime.passes.training import Slot, Trainer


@dataclass(frozen=True)
class Snapshot:
    """What this rank writes: counters of its roles, entries, and their tensors by name, flat float32 on the CPU."""

    iteration: int
    roles: Mapping[str, RoleState]
    entries: tuple[StoredEntry, ...]
    tensors: Mapping[str, Tensor]


FrozenWeights = Callable[[], Sequence[tuple[Layout, Mapping[str, Tensor]]]]
"""Gives the layouts and slices of a frozen role's copies on this rank."""
NONE: Mapping[str, FrozenWeights] = {}


class Snapshots:
    """Owns the host memory of a rank's snapshots: the next one overwrites the one before. frozen: roles without an
    optimizer whose weights change all the same, which are kept as they are."""

    def __init__(self, trainers: Mapping[str, Trainer], frozen: Mapping[str, FrozenWeights] = NONE) -> None:
        self._trainers = trainers
        self._frozen = frozen
        self._entries = {role: _entries(trainer) for role, trainer in trainers.items()}
        self._buffer = torch.empty(0)

    def prepare(self) -> None:
        """Have the kernel clear the memory of snapshots, which takes as long as a copy; not collective, for another
        thread. Nothing where a GPU copies, which wants memory of its own kind, or where frozen roles are kept."""
        if not self._frozen and not self._from_gpu:
            self._grow((1 + len(MOMENTS)) * sum(entry.size for found in self._entries.values() for entry in found))
            self._buffer.zero_()

    @torch.no_grad()
    def take(self, iteration: int) -> Snapshot:
        """Copy the state after `iteration` iterations to the host."""
        roles = {
            role: RoleState(steps=t.steps, adam_steps=t.adam_steps, kl_coefficient=t.kl_coefficient)
            for role, t in self._trainers.items()
        }
        wanted: list[tuple[StoredEntry, Tensor, int, str]] = [
            (stored, slot.master if kind == MASTER else slot.moments[kind], slot.start, kind)
            for role, trainer in self._trainers.items()
            # Masters lie together: an export reads no others, and over a network whole chunks of a file come.
            for kind in (MASTER, *(MOMENTS if roles[role].adam_steps else ()))
            for stored, slot in self._stored(role, trainer)
        ]
        for role, weights in self._frozen.items():
            for layout, held in weights()[:1]:
                roles[role] = RoleState(steps=0, adam_steps=0)
                found = [_stored(role, entry) for entry in written(layout, dist.get_rank())]
                wanted += [(stored, held[stored.parameter], 0, MASTER) for stored in found]
        self._grow(sum(stored.entry.size for stored, *_ in wanted))
        tensors, at = {}, 0
        for stored, tensor, first, kind in wanted:
            view = self._buffer[at : at + stored.entry.size]
            view.copy_(tensor.data.view(-1)[stored.start - first : stored.stop - first], non_blocking=True)
            tensors[stored.tensor(kind)] = view
            at += stored.entry.size
        if self._buffer.is_pinned():
            torch.cuda.current_stream().synchronize()
        entries = tuple(dict.fromkeys(stored for stored, *_ in wanted))
        return Snapshot(iteration, roles, entries, tensors)

    def _stored(self, role: str, trainer: Trainer) -> list[tuple[StoredEntry, Slot]]:
        slots = {slot.parameter: slot for slot in trainer.slots()}
        return [(_stored(role, entry), slots[entry.parameter]) for entry in self._entries[role]]

    @property
    def _from_gpu(self) -> bool:
        return any(trainer.model.device.type == "cuda" for trainer in self._trainers.values())

    def _grow(self, elements: int) -> None:
        """Pinned where a GPU copies into it."""
        if self._buffer.numel() < elements:
            if self._from_gpu:
                self._buffer = torch.empty(elements, pin_memory=True)
            else:
                self._buffer = torch.frombuffer(large_pages(MASTER_BYTES * elements), dtype=torch.float32)


def _stored(role: str, e: Entry) -> StoredEntry:
    file = rank_file(dist.get_rank())
    return StoredEntry(
        role=role, parameter=e.parameter, part=e.part, parts=e.parts, start=e.start, stop=e.stop, file=file
    )


def _entries(trainer: Trainer) -> list[Entry]:
    owned = {slot.parameter: (slot.start, slot.stop) for slot in trainer.slots()} if trainer.sharded else None
    return written(trainer.model.layout, dist.get_rank(), owned)
