"""Checkpoint arithmetic: who writes which elements of a model's training state, and where a reader finds its own.

A checkpoint knows no layout. It is a set of *entries*: flat ranges of slices of parameters. A slice is part `part` of
`parts` of a parameter as `plans.layout` cuts it, flat in its own row-major order; a parameter that is not cut, and an
expert's, is one slice. Ranges, because a distributed optimizer shards masters and moments by flat ranges that know no
row. A parameter is seen as a grid of [rows, columns] of which every slice has all rows and a run of columns, so that
the elements that two cuts have in common are at most a few rectangles. The frozen base of a model with adapters is not
in a checkpoint: it lies where the run has read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from plans.layout import EMBEDDING, Layout, Parameter, expert_of, trained_units
from plans.model import ModelSpec


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """Elements [start, stop) of slice `part` of `parts` of a parameter."""

    parameter: str
    part: int
    parts: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.part < self.parts, f"part {self.part} of {self.parts}"
        assert 0 <= self.start < self.stop, f"elements {self.start} to {self.stop}"

    @property
    def size(self) -> int:
        """Elements."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Overlap:
    """A rectangle of elements that a stored entry and a wanted one have in common: `rows` runs of `width` elements.
    Offsets are flat, relative to the entry's first element; strides go from one run to the next."""

    rows: int
    width: int
    source: int
    source_stride: int
    target: int
    target_stride: int


def parameters_of(spec: ModelSpec) -> dict[str, Parameter]:
    """Every parameter of a model that is trained, by name."""
    return {parameter.name: parameter for unit in trained_units(spec) for parameter in unit.parameters}


def grid_of(parameter: Parameter) -> tuple[int, int]:
    """Rows and columns of a parameter: tp cuts the columns into equal runs."""
    rows = 1 if parameter.axis is None else prod(parameter.shape[: parameter.axis]) * parameter.blocks
    return rows, parameter.size // rows


def slice_of(layout: Layout, rank: int, parameter: Parameter) -> tuple[int, int]:
    """The slice of a parameter that a rank holds, as (part, parts)."""
    return (0, 1) if parameter.axis is None else (layout.places[rank].tp, layout.tp)


def replicas(layout: Layout, rank: int, unit: str) -> tuple[int, ...]:
    """The ranks over which the optimizer state of a unit is sharded or repeated, one of them `rank`, in the order of
    Megatron's groups: dp x cp, for an expert the ranks of a stage with the same place in their run of ep ranks."""
    if expert_of(unit) is not None:
        size = len(layout.ranks) // layout.pp
        first = layout.places[rank].pp * size
        return layout.ranks[first + layout.expert_rank(rank) : first + size : layout.ep]
    at = layout.places[rank]
    return tuple(r for r, p in layout.places.items() if (p.tp, p.pp) == (at.tp, at.pp))


def written(layout: Layout, rank: int, owned: Mapping[str, tuple[int, int]] | None = None) -> list[Entry]:
    """The entries that a rank writes, so that the ranks of a layout write every element once.

    owned: the flat range of its slice of each parameter whose state the rank has, where the optimizer is sharded;
    None: every replica has all of it, and the i-th writes the i-th part. What tensor ranks or a tied last stage hold
    alike is written by the first of them.
    """
    place = layout.places[rank]
    units = {unit.name: unit for unit in trained_units(layout.spec)}
    entries = []
    for name in layout.rank_units(rank):
        if name not in units or (name == EMBEDDING and place.pp > 0):
            continue
        for parameter in units[name].parameters:
            if parameter.axis is None and expert_of(name) is None and place.tp > 0:
                continue
            part, parts = slice_of(layout, rank, parameter)
            if owned is None:
                group, size = replicas(layout, rank, name), parameter.size // parts
                i, n = group.index(rank), len(group)
                start, stop = size * i // n, size * (i + 1) // n
            else:
                start, stop = owned.get(parameter.name, (0, 0))
            if start < stop:
                entries.append(Entry(parameter.name, part, parts, start, stop))
    return entries


def overlaps(parameter: Parameter, stored: Entry, wanted: Entry) -> Iterator[Overlap]:
    """What a stored entry holds of a wanted one, whatever the two cuts are.

    Between the rows in which either of them starts or stops, each covers the same columns of every row.
    """
    rows, columns = grid_of(parameter)
    assert columns % stored.parts == columns % wanted.parts == 0, f"{parameter.name}: {columns} columns"
    widths = {entry: columns // entry.parts for entry in (stored, wanted)}
    ends = {end for e in (stored, wanted) for at in (e.start, e.stop) for end in (at // widths[e], -(-at // widths[e]))}
    for first, last in pairwise(sorted(ends)):
        mine, theirs = (_columns(entry, widths[entry], first) for entry in (stored, wanted))
        low, high = max(mine[0], theirs[0]), min(mine[1], theirs[1])
        if low < high and first < rows:
            source, target = (first * widths[e] + low - e.part * widths[e] - e.start for e in (stored, wanted))
            yield Overlap(last - first, high - low, source, widths[stored], target, widths[wanted])


def _columns(entry: Entry, width: int, row: int) -> tuple[int, int]:
    """The columns that an entry covers in a row, empty where start >= stop."""
    start, stop = entry.start - row * width, entry.stop - row * width
    return entry.part * width + max(start, 0), entry.part * width + min(stop, width)


def missing(spec: ModelSpec, entries: Iterable[Entry]) -> str:
    """Where entries do not cover every parameter of a model exactly once, in words; empty where they do."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.parameter, []).append(entry)
    parameters = parameters_of(spec)
    if strange := found.keys() - parameters.keys():
        return f"`{min(strange)}` is no parameter of the model"
    for name, parameter in parameters.items():
        if fault := _uncovered(parameter, sorted(found.get(name, ()))):
            return f"`{name}` {fault}"
    return ""


def _uncovered(parameter: Parameter, entries: list[Entry]) -> str:
    parts = entries[0].parts if entries else 1
    if any(entry.parts != parts for entry in entries) or grid_of(parameter)[1] % parts:
        return f"is not cut into {parts} equal parts"
    size, at = parameter.size // parts, (0, 0)
    for entry in entries:
        if (entry.part, entry.start) != at or entry.stop > size:
            return f"has a gap or an overlap at element {entry.start} of part {entry.part} of {parts}"
        at = (entry.part + 1, 0) if entry.stop == size else (entry.part, entry.stop)
    return "" if at == (parts, 0) else f"ends at element {at[1]} of part {at[0]} of {parts}, of {size}"
