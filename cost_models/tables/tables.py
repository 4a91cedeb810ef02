"""Cost tables: measured operation times with their conditions, one readable JSON file per hardware and model.

    {
      "format": "realplan-costs/1",
      "hardware": "h100-80gb-sxm",             GPU kind of `realplan clusters`, or cpu
      "device": "NVIDIA H100 80GB HBM3",       as the driver names it
      "model": "llama2-7b",                    "" for a table of kernels
      "precision": "bf16",
      "clocks_mhz": {"graphics": 1980},        {} when not recorded
      "versions": {"torch": "2.13.0"},
      "date": "2026-08-21",                    when the table was made
      "source": "realplan profile",
      "entries": {
        "block_forward": {
          "axes": {"tp": [1, 2], "sequences": [1, 8], "sequence_tokens": [512, 2048]},
          "values": [[[..], [..]], [[..], [..]]],
          "spread": 0.01                       optional: median of (p90 - p10) / median over the repeats
        }, ...
      }
    }

Operations, their axes and units are those of `cost_models.tables.table_schema`. Seconds and bytes grow with every
axis that is not exact; `_peak` entries hold the peak memory of the operation without its weights. A model's blocks
are timed for one layer of the tp-way shard without its collectives. Calls (`inference_call`; `train_call`: one micro-
batch and the optimizer; `generate_step`: one token of every sequence, sampling included) are timed whole on a model
of one layer, the first two with a vocabulary of `CALL_VOCAB`, so that what a schedule adds to its parts shows. In
collectives `bytes` is the whole vector (nccl-tests' convention: the output of an all-gather, the input of a reduce-
scatter). Efficiencies are shares of the vendor peak of the hardware entry (compute for GEMM and prefill, memory
bandwidth for decode); `lanes` are attention heads (prefill) or key-value heads (decode) times sequences. A grid is
full: a point that could not be measured is left out with its whole row, never null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cost_models.candidates import Array
from cost_models.tables.interpolation import Answer, Grid, Source
from cost_models.tables.table_schema import FORMAT, OPERATIONS


@dataclass(frozen=True, eq=False)
class TableEntry:
    """Measured values of one operation on a full grid, in the order of the operation's axes."""

    axes: Mapping[str, Array]
    values: Array
    spread: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class CostTable:
    """A cost table in memory; the fields are the file's keys."""

    hardware: str
    device: str
    precision: str
    date: str
    source: str
    model: str = ""
    clocks_mhz: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[str, TableEntry] = field(default_factory=dict)

    def grid(self, operation: str) -> Grid | None:
        """The grid of an operation, None when the table does not have it."""
        entry = self.entries.get(operation)
        if entry is None:
            return None
        what = OPERATIONS[operation]
        return Grid(axes=entry.axes, values=entry.values, exact=what.exact, grows=what.unit != "1")

    def answer(self, operation: str, points: Mapping[str, Array | float], fallback: Array | float) -> Answer:
        """Values of an operation at points by axis; `fallback`, marked analytic, where the table has nothing."""
        grid = self.grid(operation)
        if grid is not None:
            return grid.answer(points, fallback)
        value = np.broadcast_arrays(np.asarray(fallback, dtype=np.float64), *points.values())[0]
        return Answer(value, np.full(value.shape, Source.ANALYTIC, dtype=np.int8), np.ones(value.shape))


def table_text(table: CostTable) -> str:
    """The file of a table; the innermost row of values is one line."""
    head: dict[str, Any] = {"format": FORMAT, "hardware": table.hardware, "device": table.device, "model": table.model}
    head |= {"precision": table.precision, "clocks_mhz": dict(table.clocks_mhz), "versions": dict(table.versions)}
    head |= {"date": table.date, "source": table.source}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    entries = ",\n".join(f"    {json.dumps(name)}: {_entry_text(entry)}" for name, entry in table.entries.items())
    return "{\n" + "\n".join(lines) + '\n  "entries": {\n' + entries + "\n  }\n}\n"


def _entry_text(entry: TableEntry) -> str:
    axes = ", ".join(f"{json.dumps(name)}: {_row(points)}" for name, points in entry.axes.items())
    spread = f',\n      "spread": {_number(entry.spread)}' if entry.spread else ""
    return f'{{\n      "axes": {{{axes}}},\n      "values": {_nested(entry.values, 8)}{spread}\n    }}'


def _nested(values: Array, indent: int) -> str:
    if values.ndim == 1:
        return _row(values)
    rows = ",\n".join(" " * indent + _nested(part, indent + 2) for part in values)
    return "[\n" + rows + "\n" + " " * (indent - 2) + "]"


def _row(values: Array) -> str:
    return "[" + ", ".join(_number(value) for value in values) + "]"


def _number(value: float) -> str:
    """Four digits, integers as such: measurements repeat to no more."""
    return str(int(value)) if value == int(value) and value < 1e15 else repr(float(f"{value:.4g}"))
