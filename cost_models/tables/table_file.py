"""Cost tables from and to their files: every mistake with its line and column, its key, and what is legal there."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from cost_models.candidates import Array
from cost_models.tables.table_schema import FORMAT, OPERATIONS, Operation, TableError
from cost_models.tables.tables import CostTable, TableEntry, table_text
from plans.documents import BadText, locate, parse_json, read_text
from plans.errors import nearest
from plans.files import write_atomically
from plans.library import gpu_names
from plans.problems import Path_, Problem, shortened
from plans.workload import DTYPE_BYTES

MOST_TABLE_BYTES = 64 * 2**20
_WRITER = "`realplan profile` writes cost tables"
_LEAST, _MOST = 1e-12, 1e15
"""Bounds of every value (seconds, bytes or shares): what lies beyond was not measured."""
_TEXTS = ("hardware", "device", "precision", "date", "source")


def load_table(path: Path) -> CostTable:
    """Read and check a cost table; raises TableError with line and column."""
    text = table_source(path)
    try:
        data = parse_json(text)
    except BadText as error:
        at = error.problem
        raise TableError(f"{path}:{at.line or 1}:{at.column or 1}: {at.message}", at.hint) from None
    return parse_table(data, str(path), text)


def table_source(path: Path) -> str:
    """The text of a cost table; raises TableError when it cannot be read."""
    if not os.path.exists(path):
        raise TableError(f"{path}: no such cost table", _WRITER)
    return read_text(path, TableError, "cost table", _WRITER, MOST_TABLE_BYTES)


def parse_table(data: Any, origin: str, text: str = "") -> CostTable:
    """A cost table from JSON data; `origin` names the file in errors, `text` is what it holds, where there is one."""
    try:
        return _table(data)
    except _Fault as fault:
        raise located_fault(fault.path, fault.message, fault.hint, origin, text) from None


def located_fault(path: Path_, message: str, hint: str, origin: str, text: str) -> TableError:
    """The error of the value at `path` of a table: `file:line:column: key: message`."""
    key = "".join(f"[{step}]" if isinstance(step, int) else f".{shortened(step)}" for step in path).removeprefix(".")
    words = f"{key}: {message}" if key else message
    if not text:
        return TableError(f"{origin}: {words}", hint)
    (found,) = locate(text, [Problem("table", words, hint, path)])
    return TableError(f"{origin}:{found.line}:{found.column}: {words}", hint)


def save_table(table: CostTable, path: Path) -> None:
    """Write a table to its file, checked."""
    text = table_text(table)
    parse_table(json.loads(text), str(path), text)
    write_atomically(path, text)


class _Fault(Exception):
    """A rule that the value at `path` breaks."""

    def __init__(self, path: Path_, message: str, hint: str = _WRITER) -> None:
        super().__init__(message)
        self.path, self.message, self.hint = path, message, hint


def _table(data: Any) -> CostTable:
    _check_keys(data, (), required=(*_TEXTS, "entries", "format"), optional=("model", "clocks_mhz", "versions"))
    if data["format"] != FORMAT:
        raise _Fault(("format",), f"`{shortened(data['format'])}` is unknown", f"`{FORMAT}`")
    for key in _TEXTS:
        if not isinstance(data[key], str) or not data[key]:
            raise _Fault((key,), f"{_shown(data[key])} must be a text that is not empty", f'"{key}": "..."')
    if not isinstance(data.get("model", ""), str):
        rule = f"{_shown(data['model'])} must be a text (empty for a table of kernels)"
        raise _Fault(("model",), rule, '"model": "llama2-7b", for example')
    for key, legal in (("hardware", gpu_names()), ("precision", list(DTYPE_BYTES))):
        if data[key] not in legal:
            raise _Fault((key,), f"`{shortened(data[key])}` is unknown", nearest(data[key], legal))
    for key in ("entries", "clocks_mhz", "versions"):
        _check_object(data.get(key, {}), (key,))
    for name, clock in data.get("clocks_mhz", {}).items():
        if not _is_number(clock):
            raise _Fault(("clocks_mhz", name), f"{_shown(clock)} must be a number", f'"{name}": 1980')
    for name, version in data.get("versions", {}).items():
        if not isinstance(version, str):
            raise _Fault(("versions", name), f"{_shown(version)} must be a text", f'"{name}": "1.0"')
    return CostTable(
        **{key: data[key] for key in _TEXTS},
        model=data.get("model", ""),
        clocks_mhz=data.get("clocks_mhz", {}),
        versions=data.get("versions", {}),
        entries={name: _entry(name, entry) for name, entry in data["entries"].items()},
    )


def _check_object(data: Any, path: Path_) -> None:
    if not isinstance(data, dict):
        raise _Fault(path, f"{type(data).__name__} where an object must stand", "{...}")


def _check_keys(data: Any, path: Path_, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    _check_object(data, path)
    for key in data:
        if key not in required + optional:
            raise _Fault((*path, key), f"unknown key `{shortened(key)}`", nearest(key, required + optional))
    for key in required:
        if key not in data:
            raise _Fault(path, f"key `{key}` is missing", f'add "{key}"; {_WRITER}')


def _entry(name: str, data: Any) -> TableEntry:
    at: Path_ = ("entries", name)
    if name not in OPERATIONS:
        raise _Fault(at, f"unknown operation `{shortened(name)}`", nearest(name, list(OPERATIONS)))
    _check_keys(data, at, required=("axes", "values"), optional=("spread",))
    what = OPERATIONS[name]
    _check_object(data["axes"], (*at, "axes"))
    if tuple(data["axes"]) != what.axes:
        rule = f"{shortened(list(data['axes']))} must be {list(what.axes)}, in this order"
        raise _Fault((*at, "axes"), rule, ", ".join(f'"{axis}": [...]' for axis in what.axes))
    axes = {axis: _axis(points, (*at, "axes", axis)) for axis, points in data["axes"].items()}
    for axis in what.exact:
        if (axes[axis] % 1.0).any():
            raise _Fault((*at, "axes", axis), f"{shortened(axes[axis].tolist())} must be whole numbers", "[1, 2]")
    values = _values(data["values"], tuple(len(points) for points in axes.values()), (*at, "values"))
    spread = data.get("spread", 0.0)
    if not _is_number(spread) or spread < 0:
        raise _Fault((*at, "spread"), f"{_shown(spread)} must be a number that is not negative", '"spread": 0.01')
    entry = TableEntry(axes=axes, values=values, spread=float(spread))
    _check_consistent(what, entry, (*at, "values"))
    return entry


def _axis(points: Any, path: Path_) -> Array:
    if not isinstance(points, list) or not points or not all(_is_number(point) and point > 0 for point in points):
        raise _Fault(path, f"{_shown(points)} must be a list of positive numbers", "[1, 2, 4]")
    if max(points) > _MOST:
        raise _Fault(path, f"{shortened(max(points))} must be at most {_MOST:g}", "[1, 2, 4]")
    if any(b <= a for a, b in itertools.pairwise(points)):
        raise _Fault(path, f"{shortened(points)} must ascend", shortened(sorted(set(points))))
    return np.array(points, dtype=np.float64)


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -1e300 < value < 1e300  # NaN fails


def _shown(value: Any) -> str:
    return shortened(value if isinstance(value, int) else repr(value))


def _values(data: Any, shape: tuple[int, ...], path: Path_) -> Array:
    """Nested lists of a full grid; the first hole, wrong length or value that is not positive is named by its index."""
    if len(shape) == 1 and isinstance(data, list) and len(data) == shape[0] and all(type(x) is float for x in data):
        row = np.array(data)
        if row.min() >= _LEAST and row.max() <= _MOST:  # NaN fails
            return row
    if not shape:
        legal = f"a number from {_LEAST:g} to {_MOST:g}; {_WRITER}"
        if data is None or data != data:  # NaN is not itself
            raise _Fault(path, f"{data!r} is a hole in the grid; every point must be a number", legal)
        if not _is_number(data):
            raise _Fault(path, f"{_shown(data)} must be a number", legal)
        if data <= 0:
            raise _Fault(path, f"{_shown(data)} must be positive", legal)
        if not _LEAST <= data <= _MOST:
            raise _Fault(path, f"{_shown(data)} must lie between {_LEAST:g} and {_MOST:g}", legal)
        return np.array(data, dtype=np.float64)
    if not isinstance(data, list) or len(data) != shape[0]:
        found = f"{len(data)} values" if isinstance(data, list) else _shown(data)
        raise _Fault(path, f"{found} where the axis has {shape[0]} points", f"a list of {shape[0]}")
    return np.stack([_values(item, shape[1:], (*path, i)) for i, item in enumerate(data)])


def _check_consistent(what: Operation, entry: TableEntry, path: Path_) -> None:
    """Efficiencies are at most 1; seconds and bytes may not halve where the work grows."""
    if what.unit == "1":
        if entry.values.max() > 1.0:
            most = entry.values.max()
            raise _Fault(path, f"{most:.3g} exceeds the vendor peak; an efficiency is at most 1", "1.0 or less")
        return
    for number, axis in enumerate(what.axes):
        if axis in what.exact or entry.values.shape[number] < 2:
            continue
        ratio = np.exp(np.diff(np.log(entry.values), axis=number))
        if ratio.min() < 0.5:
            step = int(np.unravel_index(ratio.argmin(), ratio.shape)[number])
            points = entry.axes[axis]
            raise _Fault(
                path,
                f"falls to {ratio.min():.2f} of itself from {axis} {points[step]:g} to {points[step + 1]:g};"
                " it may not fall below half where the work grows",
                "measure the two points again",
            )
