"""Results: measured points by operation, read from and written to a cost table."""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cost_models.tables.table_file import load_table, parse_table
from cost_models.tables.table_schema import OPERATIONS
from cost_models.tables.tables import CostTable, TableEntry, table_text
from plans.files import write_atomically
from profiler.timers import Timing

Coordinates = tuple[int, ...]


@dataclass
class Results:
    """Points measured so far, in a file that is rewritten whole after every group of points."""

    head: CostTable
    path: Path
    points: dict[str, dict[Coordinates, Timing]] = field(default_factory=dict)

    @classmethod
    def resume(cls, head: CostTable, path: Path) -> Results:
        """Take up the points of an unfinished table that was measured under the same conditions, if there is one."""
        results = cls(head, path)
        if os.path.exists(path):
            before = load_table(path)
            if conditions(before) == conditions(head):
                results.points = {name: _points(entry) for name, entry in before.entries.items()}
        return results

    def add(self, operation: str, point: Coordinates, timing: Timing) -> None:
        """Take a measurement in."""
        self.points.setdefault(operation, {})[point] = timing

    def has(self, operation: str, point: Coordinates) -> bool:
        """Whether a point is measured."""
        return point in self.points.get(operation, {})

    def table(self) -> CostTable:
        """What is measured so far."""
        entries = {name: full_grid(name, points) for name, points in self.points.items() if points}
        return replace(self.head, entries={name: entry for name, entry in entries.items() if entry.values.size})

    def save(self) -> CostTable:
        """Check and write the table; the table as a reader will see it."""
        text = table_text(self.table())
        table = parse_table(json.loads(text), str(self.path))
        write_atomically(self.path, text)
        return table


def conditions(table: CostTable) -> tuple[object, ...]:
    """What must be equal for points of two tables to stand side by side."""
    return table.hardware, table.device, table.model, table.precision, table.source, dict(table.versions)


def full_grid(operation: str, points: Mapping[Coordinates, Timing]) -> TableEntry:
    """Points on a full grid; sizes at which some point is missing are left out with their whole row."""
    names = OPERATIONS[operation].axes
    axes = [sorted({point[i] for point in points}) for i in range(len(names))]
    size = min(1, len(names) - 1)  # the axis behind tp: sequences, tokens or bytes
    others = [axis for i, axis in enumerate(axes) if i != size]
    axes[size] = [
        value
        for value in axes[size]
        if all((*rest[:size], value, *rest[size:]) in points for rest in itertools.product(*others))
    ]
    kept = list(itertools.product(*axes))
    values = np.array([points[point].seconds for point in kept], dtype=np.float64)
    spread = statistics.median([points[point].spread for point in kept]) if kept else 0.0
    return TableEntry(
        axes={name: np.array(axis, dtype=np.float64) for name, axis in zip(names, axes, strict=True)},
        values=values.reshape([len(axis) for axis in axes]),
        spread=spread,
    )


def _points(entry: TableEntry) -> dict[Coordinates, Timing]:
    grid = itertools.product(*([int(value) for value in axis] for axis in entry.axes.values()))
    return {point: Timing(float(v), entry.spread) for point, v in zip(grid, entry.values.flat, strict=True)}
