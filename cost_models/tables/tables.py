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

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cost_models.candidates import Array
from cost_models.tables.interpolation import Answer, Grid, Source
from cost_models.tables.table_schema import FORMAT, OPERATIONS, Operation, TableError
from plans.errors import nearest
from plans.files import write_atomically
from plans.library import gpu_names
from plans.workload import DTYPE_BYTES


@dataclass(frozen=True, eq=False)
class Entry:
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
    entries: Mapping[str, Entry] = field(default_factory=dict)

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


def load_table(path: Path) -> CostTable:
    """Read and check a cost table."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise TableError(f"{path}: no such cost table", _WRITER) from None
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"{path}: not a cost table: {error}", _WRITER) from None
    except json.JSONDecodeError as error:
        raise TableError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}", _WRITER) from None
    return parse_table(data, str(path))


def parse_table(data: Any, origin: str) -> CostTable:
    """A cost table from JSON data; `origin` names the file in errors."""
    _check_keys(data, origin, "", required=(*_TEXTS, "entries", "format"), optional=("model", "clocks_mhz", "versions"))
    if data["format"] != FORMAT:
        raise TableError(f"{origin}: format: `{data['format']}` is unknown", f"`{FORMAT}`")
    for key in _TEXTS:
        if not isinstance(data[key], str) or not data[key]:
            raise TableError(f"{origin}: {key}: {data[key]!r} must be a text that is not empty")
    if not isinstance(data.get("model", ""), str):
        raise TableError(f"{origin}: model: {data['model']!r} must be a text (empty for a table of kernels)")
    for key, legal in (("hardware", gpu_names()), ("precision", list(DTYPE_BYTES))):
        if data[key] not in legal:
            raise TableError(f"{origin}: {key}: `{data[key]}` is unknown", nearest(data[key], legal))
    for key in ("entries", "clocks_mhz", "versions"):
        _check_object(data.get(key, {}), f"{origin}: {key}")
    entries = {name: _parse_entry(name, entry, origin) for name, entry in data["entries"].items()}
    return CostTable(
        **{key: data[key] for key in _TEXTS},
        model=data.get("model", ""),
        clocks_mhz=data.get("clocks_mhz", {}),
        versions=data.get("versions", {}),
        entries=entries,
    )


_WRITER = "`realplan profile` writes cost tables"
_LEAST, _MOST = 1e-12, 1e15
"""Bounds of every value (seconds, bytes or shares): what lies beyond was not measured."""
_TEXTS = ("hardware", "device", "precision", "date", "source")


def _check_object(data: Any, where: str) -> None:
    if not isinstance(data, dict):
        raise TableError(f"{where}: {type(data).__name__} where an object must stand")


def _check_keys(data: Any, origin: str, at: str, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    where = f"{origin}: {at}" if at else origin
    _check_object(data, where)
    for key in data:
        if key not in required + optional:
            raise TableError(f"{where}: unknown key `{key}`", nearest(key, required + optional))
    for key in required:
        if key not in data:
            raise TableError(f"{where}: key `{key}` is missing")


def _parse_entry(name: str, data: Any, origin: str) -> Entry:
    if name not in OPERATIONS:
        raise TableError(f"{origin}: entries: unknown operation `{name}`", nearest(name, list(OPERATIONS)))
    at = f"entries.{name}"
    _check_keys(data, origin, at, required=("axes", "values"), optional=("spread",))
    what = OPERATIONS[name]
    if tuple(data["axes"]) != what.axes:
        raise TableError(f"{origin}: {at}.axes: {list(data['axes'])} must be {list(what.axes)}, in this order")
    axes = {axis: _parse_axis(points, f"{origin}: {at}.axes.{axis}") for axis, points in data["axes"].items()}
    for axis in what.exact:
        if (axes[axis] % 1.0).any():
            raise TableError(f"{origin}: {at}.axes.{axis}: {axes[axis].tolist()} must be whole numbers")
    values = _parse_values(data["values"], tuple(len(points) for points in axes.values()), f"{origin}: {at}.values")
    spread = data.get("spread", 0.0)
    if not _is_number(spread) or spread < 0:
        raise TableError(f"{origin}: {at}.spread: {spread!r} must be a number that is not negative")
    entry = Entry(axes=axes, values=values, spread=float(spread))
    _check_consistent(what, entry, f"{origin}: {at}.values")
    return entry


def _parse_axis(points: Any, where: str) -> Array:
    if not isinstance(points, list) or not points or not all(_is_number(point) and point > 0 for point in points):
        raise TableError(f"{where}: {points!r} must be a list of positive numbers")
    if max(points) > _MOST:
        raise TableError(f"{where}: {max(points)!r:.40} must be at most {_MOST:g}")
    if any(b <= a for a, b in itertools.pairwise(points)):
        raise TableError(f"{where}: {points} must ascend")
    return np.array(points, dtype=np.float64)


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, float) and math.isfinite(value))


def _parse_values(data: Any, shape: tuple[int, ...], where: str) -> Array:
    """Nested lists of a full grid; the first hole, wrong length or value that is not positive is named by its index."""
    if not shape:
        if data is None or data != data:  # NaN is not itself
            raise TableError(f"{where}: {data!r} is a hole in the grid; every point must be a number")
        if not _is_number(data):
            raise TableError(f"{where}: {data!r:.40} must be a number")
        if data <= 0:
            raise TableError(f"{where}: {data} must be positive")
        if not _LEAST <= data <= _MOST:
            raise TableError(f"{where}: {data!r:.40} must lie between {_LEAST:g} and {_MOST:g}")
        return np.array(data, dtype=np.float64)
    if not isinstance(data, list) or len(data) != shape[0]:
        found = f"{len(data)} values" if isinstance(data, list) else repr(data)
        raise TableError(f"{where}: {found} where the axis has {shape[0]} points")
    return np.stack([_parse_values(item, shape[1:], f"{where}[{i}]") for i, item in enumerate(data)])


def _check_consistent(what: Operation, entry: Entry, where: str) -> None:
    """Efficiencies are at most 1; seconds and bytes may not halve where the work grows."""
    if what.unit == "1":
        if entry.values.max() > 1.0:
            raise TableError(f"{where}: {entry.values.max():.3g} exceeds the vendor peak; an efficiency is at most 1")
        return
    for number, axis in enumerate(what.axes):
        if axis in what.exact or entry.values.shape[number] < 2:
            continue
        ratio = np.exp(np.diff(np.log(entry.values), axis=number))
        if ratio.min() < 0.5:
            step = int(np.unravel_index(ratio.argmin(), ratio.shape)[number])
            points = entry.axes[axis]
            raise TableError(
                f"{where}: falls to {ratio.min():.2f} of itself from {axis} {points[step]:g} to {points[step + 1]:g};"
                " it may not fall below half where the work grows",
                "measure the two points again",
            )


def table_text(table: CostTable) -> str:
    """The file of a table; the innermost row of values is one line."""
    head: dict[str, Any] = {"format": FORMAT, "hardware": table.hardware, "device": table.device, "model": table.model}
    head |= {"precision": table.precision, "clocks_mhz": dict(table.clocks_mhz), "versions": dict(table.versions)}
    head |= {"date": table.date, "source": table.source}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    entries = ",\n".join(f"    {json.dumps(name)}: {_entry_text(entry)}" for name, entry in table.entries.items())
    return "{\n" + "\n".join(lines) + '\n  "entries": {\n' + entries + "\n  }\n}\n"


def save_table(table: CostTable, path: Path) -> None:
    """Write a table to its file, checked."""
    text = table_text(table)
    parse_table(json.loads(text), str(path))
    write_atomically(path, text)


def _entry_text(entry: Entry) -> str:
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
