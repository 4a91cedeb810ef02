"""Host copies of a rank's part of the training state, so that training can go on while they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from plans.checkpoint import Entry, written
from plans.checkpoint_files import MASTER, MOMENTS, RoleState, StoredEntry
from runtime.passes.training import Slot, Trainer


def rank_file(rank: int) -> str:
    """Name of a rank's tensors in a checkpoint."""
    return f"rank-{rank:05d}.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """What this rank writes: counters of its roles, entries, and their tensors by name, flat float32 on the CPU."""

    iteration: int
    roles: Mapping[str, RoleState]
    entries: tuple[StoredEntry, ...]
    tensors: Mapping[str, Tensor]


class Snapshots:
    """Owns the host memory of a rank's snapshots: the next one overwrites the one before."""

    def __init__(self, trainers: Mapping[str, Trainer]) -> None:
        self._trainers = trainers
        self._entries = {role: _entries(trainer) for role, trainer in trainers.items()}
        self._buffer = torch.empty(0)

    @torch.no_grad()
    def take(self, iteration: int) -> Snapshot:
        """Copy the state after `iteration` iterations to the host."""
        roles = {
            role: RoleState(steps=t.steps, adam_steps=t.adam_steps, kl_coefficient=t.kl_coefficient)
            for role, t in self._trainers.items()
        }
        wanted = [
            (stored, slot.master if kind == MASTER else slot.moments[kind], slot.start, kind)
            for role, trainer in self._trainers.items()
            for stored, slot in self._stored(role, trainer)
            for kind in (MASTER, *(MOMENTS if roles[role].adam_steps else ()))
        ]
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
        file = rank_file(dist.get_rank())
        return [
            (
                StoredEntry(
                    role=role, parameter=e.parameter, part=e.part, parts=e.parts, start=e.start, stop=e.stop, file=file
                ),
                slots[e.parameter],
            )
            for e in self._entries[role]
        ]

    def _grow(self, elements: int) -> None:
        """Pinned where a GPU copies into it."""
        if self._buffer.numel() < elements:
            cuda = any(trainer.model.device.type == "cuda" for trainer in self._trainers.values())
            self._buffer = torch.empty(elements, pin_memory=cuda)


def _entries(trainer: Trainer) -> list[Entry]:
    owned = {slot.parameter: (slot.start, slot.stop) for slot in trainer.slots()} if trainer.sharded else None
    return written(trainer.model.layout, dist.get_rank(), owned)
