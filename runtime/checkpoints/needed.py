"""Which bytes of a checkpoint ranks read when they take it up. No torch: a machine asks it before its ranks start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from plans.checkpoint import Entry, overlaps, parameters_of, slice_of, written
from plans.checkpoint_files import MASTER, MOMENTS, Checkpoint, StoredEntry
from plans.flat_tensors import ELEMENT_BYTES, tensor_places
from plans.layout import Layout, trained_units
from plans.plan import ExecutionPlan
from plans.program import compile_program
from runtime.checkpoints.folder import rank_file

FileBytes = tuple[str, int, int]
"""A file, and bytes of it: from, and up to."""


def needed_bytes(checkpoint: Checkpoint, plan: ExecutionPlan, ranks: Sequence[int]) -> Iterator[FileBytes]:
    """What some ranks of a plan read, in no order and some of it twice."""
    program = compile_program(plan)
    for role in checkpoint.index.roles:
        trained = role in program.homes
        homes = [program.homes[role]] if trained else [copy for copy in program.copies if copy.role == role]
        as_written = trained and _shards_alike(checkpoint.plan, plan, role)
        for layout in (copy.layout for copy in homes):
            for rank in (rank for rank in ranks if rank in layout.ranks):
                yield from bytes_read(checkpoint, role, layout, rank, trained=trained, as_written=as_written)


def master_bytes(checkpoint: Checkpoint, role: str) -> Iterator[FileBytes]:
    """What an export reads: the masters of a role."""
    entries = [entry for entry in checkpoint.index.entries if entry.role == role]
    places = {file: tensor_places(checkpoint.folder / file) for file in {entry.file for entry in entries}}
    for entry in entries:
        yield entry.file, *places[entry.file][entry.tensor(MASTER)]


def bytes_read(
    checkpoint: Checkpoint, role: str, layout: Layout, rank: int, *, trained: bool, as_written: bool
) -> Iterator[FileBytes]:
    """What a rank reads of a role's state: masters of the slices that it holds, and where the role is trained moments.

    as_written: its optimizer is sharded as when the checkpoint was written. Then it reads the moments that it has
    written itself, where it was the one to write; else those of all its slices, whatever flat ranges of them it has.
    """
    parameters, stored = parameters_of(checkpoint.plan.workload.models[role]), dict[str, list[StoredEntry]]()
    for entry in checkpoint.index.entries:
        if entry.role == role:
            stored.setdefault(entry.parameter, []).append(entry)
    files = {entry.file for entries in stored.values() for entry in entries}
    places = {file: tensor_places(checkpoint.folder / file) for file in files}
    moments = MOMENTS if trained and checkpoint.index.roles[role].adam_steps else ()
    own = _written_by(layout, rank) if as_written else set()
    for name in _held_by(layout, rank):
        part, parts = slice_of(layout, rank, parameters[name])
        wanted = Entry(name, part, parts, 0, parameters[name].size // parts)
        for entry in stored[name]:
            kinds = (MASTER,) if name in own and entry.file != rank_file(rank) else (MASTER, *moments)
            for o in overlaps(parameters[name], entry.entry, wanted):
                last = o.source + (o.rows - 1) * o.source_stride + o.width
                for kind in kinds:
                    begin, _ = places[entry.file][entry.tensor(kind)]
                    yield entry.file, begin + o.source * ELEMENT_BYTES, begin + last * ELEMENT_BYTES


def _held_by(layout: Layout, rank: int) -> Iterator[str]:
    """The parameters of which a rank holds a slice; frozen ones are read from the folder of the weights."""
    units = {unit.name: unit for unit in trained_units(layout.spec)}
    yield from (p.name for unit in layout.rank_units(rank) if unit in units for p in units[unit].parameters)


def _written_by(layout: Layout, rank: int) -> set[str]:
    """The parameters of which a rank writes what it has of their optimizer state."""
    whole = {p.name: (0, p.size) for unit in trained_units(layout.spec) for p in unit.parameters}
    return {entry.parameter for entry in written(layout, rank, whole)}


def _shards_alike(then: ExecutionPlan, now: ExecutionPlan, role: str) -> bool:
    """Whether two plans shard a role's optimizer over the same ranks, and so into the same flat ranges."""
    calls = [plan.workload.graph.trainers.get(role) for plan in (then, now)]
    if None in calls or then.workload.dtype != now.workload.dtype:
        return False
    layouts = [plan.layout(str(call)) for plan, call in zip((then, now), calls, strict=True)]
    strategies = [plan.planned(str(call)).strategy for plan, call in zip((then, now), calls, strict=True)]
    return layouts[0] == layouts[1] and all(strategy.shard_optimizer for strategy in strategies)
