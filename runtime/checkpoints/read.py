"""A checkpoint's state into the trainers of a plan, whatever plan wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from plans.checkpoint import Entry, overlaps, parameters_of, slice_of
from plans.checkpoint_files import MASTER, Checkpoint, StoredEntry
from plans.layout import Layout, Parameter
from runtime.checkpoints.held import Held
from runtime.models.model import named_shards
from runtime.passes.training import Slot, Trainer
from runtime.weights.copies import Copies

Slices = Mapping[str, tuple[int, int]]


class CheckpointReader:
    """Reads elements of a role's state out of a checkpoint's files, and no more than it needs of them."""

    def __init__(self, checkpoint: Checkpoint, role: str) -> None:
        self._folder = checkpoint.folder
        self._parameters = parameters_of(checkpoint.plan.workload.models[role])
        self._stored: dict[str, list[StoredEntry]] = {}
        for stored in checkpoint.index.entries:
            if stored.role == role:
                self._stored.setdefault(stored.parameter, []).append(stored)
        self._files: dict[str, Any] = {}
        self._held = Held(checkpoint.folder)
        self._open = ExitStack()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, wanted: Entry, kind: str) -> Tensor:
        """The wanted elements of a kind of state, flat float32 on the CPU."""
        found = torch.empty(wanted.size)
        self.read_into(found, wanted, kind)
        return found

    def read_into(self, found: Tensor, wanted: Entry, kind: str) -> None:
        """The same into a flat tensor on the CPU, of any precision, straight from the file."""
        parameter = self._parameters[wanted.parameter]
        for stored in self._stored[wanted.parameter]:
            self._fill(found, parameter, stored, wanted, kind)

    def _fill(self, found: Tensor, parameter: Parameter, stored: StoredEntry, wanted: Entry, kind: str) -> None:
        """Copy the rectangles that a stored entry has of the wanted one; the file is read in runs, never whole."""
        for o in overlaps(parameter, stored.entry, wanted):
            stop = o.source + (o.rows - 1) * o.source_stride + o.width
            self._held.check(stored.file, stored.tensor(kind), o.source, stop)
            run = self._file(stored.file).get_slice(stored.tensor(kind))[o.source : stop]
            source = run.as_strided((o.rows, o.width), (o.source_stride, 1))
            # An offset of `as_strided` counts from the start of the storage, where a parameter's tensor need not begin.
            first = found.storage_offset() + o.target
            found.as_strided((o.rows, o.width), (o.target_stride, 1), first).copy_(source)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = self._open.enter_context(safe_open(self._folder / name, framework="pt"))
        return self._files[name]


@torch.no_grad()
def restore(checkpoint: Checkpoint, trainers: Mapping[str, Trainer]) -> None:
    """Give this rank's trainers the weights and the optimizer state of a checkpoint. Not collective.

    Weights are the masters, rounded where the model is bf16, so that every holder of a slice reads them itself.
    """
    rank = dist.get_rank()
    for role, trainer in trainers.items():
        layout, state = trainer.model.layout, checkpoint.index.roles[role]
        slices = {parameter.name: slice_of(layout, rank, parameter) for parameter, _ in named_shards(trainer.model)}
        with CheckpointReader(checkpoint, role) as reader:
            for parameter, held in named_shards(trainer.model):
                if parameter.frozen:  # read from the folder of the weights, as at the start of a run
                    continue
                whole = _entry(parameter.name, slices, 0, held.numel())
                if held.device.type == "cpu" and held.is_contiguous():
                    reader.read_into(held.data.view(-1), whole, MASTER)
                else:  # many small rectangles would each be a copy to the device
                    held.data.copy_(reader.read(whole, MASTER).view_as(held))

            def read(slot: Slot, kind: str, reader: CheckpointReader = reader, slices: Slices = slices) -> Tensor:
                return reader.read(_entry(slot.parameter, slices, slot.start, slot.stop), kind)

            trainer.restore(state.steps, state.adam_steps, read)
            trainer.kl_coefficient = state.kl_coefficient


@torch.no_grad()
def restore_frozen(checkpoint: Checkpoint, copies: Copies) -> None:
    """Give frozen roles the weights that a checkpoint has of them, which are those that changed. Not collective."""
    rank = dist.get_rank()
    workload = checkpoint.plan.workload
    for role in checkpoint.index.roles.keys() - workload.graph.trainers.keys():
        with CheckpointReader(checkpoint, role) as reader:

            def read(layout: Layout, name: str, held: Tensor, reader: CheckpointReader = reader) -> Tensor:
                parameters = parameters_of(layout.spec)
                part, parts = slice_of(layout, rank, parameters[name])
                return reader.read(Entry(name, part, parts, 0, held.numel()), MASTER)

            copies.set_frozen(role, read)


def _entry(name: str, slices: Slices, start: int, stop: int) -> Entry:
    part, parts = slices[name]
    return Entry(name, part, parts, start, stop)
