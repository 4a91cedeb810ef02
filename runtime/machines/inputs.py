"""Data and tokenizer of a run on one machine: those that are there, and in the place of those that are not, copies from
a machine that has them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from plans.errors import RealplanError
from plans.runfile import RunFile
from runtime.machines.files import FileServer, Source, fetch_pieces
from runtime.machines.named import input_paths
from runtime.machines.wire import Message


class Inputs:
    """Data and tokenizer of a run on a machine. files: serves those that are there. node: this machine's."""

    def __init__(self, run: RunFile, files: FileServer, node: int) -> None:
        self._run, self._files = run, files
        self.place = Path(run.output) / f".inputs-{node}"
        """Where copies lie of what is not there."""
        self._sums: dict[tuple[str, int, int], str] = {}
        self.placed: dict[str, str] = {}
        """Where what is not there lies instead, by its path in the run file."""

    def close(self) -> None:
        """Remove what was fetched."""
        if os.path.isdir(self.place):
            shutil.rmtree(self.place, ignore_errors=True)
            with suppress(OSError):  # where nothing else is in it, it was made for this
                self.place.parent.rmdir()

    def describe(self) -> Message:
        """By number the data and the tokenizer that are there: whether it is a folder, size and checksum of its files,
        and a mark of all that. They are served from now on. Raises DataError for a folder without any."""
        found = {}
        for number, path in enumerate(input_paths(self._run)):
            if not os.path.exists(path):
                continue
            files = {}
            for name, file in self._read(path).items():
                self._files.more[_served(number, name)] = file
                files[name] = [file.stat().st_size, self._sum(file)]
            mark = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
            found[str(number)] = {"folder": os.path.isdir(path), "files": files, "mark": mark}
        return {"inputs": found}

    def fetch(self, inputs: Mapping[str, Any]) -> Message:
        """Have data and tokenizer that are not there. inputs: by number what `describe` says of them, and the sources.
        Says how many bytes have come. Raises OSError and RealplanError."""
        come, paths = 0, input_paths(self._run)
        if not self.placed:
            shutil.rmtree(self.place, ignore_errors=True)  # of a process that was killed
        for number, of in inputs.items():
            path, here = paths[int(number)], self.place / str(int(number))
            if path not in self.placed:
                here.mkdir(parents=True, exist_ok=True)
                files = {_plain(name): (int(size), str(digest)) for name, (size, digest) in of["files"].items()}
                self._check_room(path, sum(size for size, _ in files.values()))
                for name, (size, digest) in files.items():
                    _fetch(here / name, size, digest, [tuple(source) for source in of["sources"]], int(number), name)
                    come += size
                self.placed[path] = str(here if of["folder"] else here / next(iter(files)))
        return {"bytes": come}

    def _read(self, path: str) -> dict[str, Path]:
        """The files of a path that ranks read, by their names in it."""
        from runtime.batches.chat import TEMPLATE
        from runtime.batches.files import data_files
        from runtime.batches.tokenizer import FILES

        if path == self._run.tokenizer:
            return {name: Path(path) / name for name in (*FILES, TEMPLATE) if os.path.isfile(Path(path) / name)}
        base = Path(path) if os.path.isdir(path) else Path(path).parent
        return {file.relative_to(base).as_posix(): file for file in data_files(Path(path))}

    def _sum(self, file: Path) -> str:
        """A checksum of a file, made once for as long as it stays as it is."""
        stat = file.stat()
        key = (str(file), stat.st_size, stat.st_mtime_ns)
        if key not in self._sums:
            self._sums[key] = _digest(file)
        return self._sums[key]

    def _check_room(self, path: str, need: int) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.place).free
        if free < need:
            raise RealplanError(
                f"`{path}`, which is not on this machine, has {need / 2**30:.1f} GiB; `{self.place.parent}` has room "
                f"for {free / 2**30:.1f} GiB",
                "output=FOLDER on a disk with room, or the same files on every machine",
            )


def _served(number: int, name: str) -> str:
    return f"inputs/{number}/{name}"


def _plain(name: str) -> str:
    """The name of a file in a folder, which leads nowhere else. Raises RealplanError."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        raise RealplanError(f"another machine names a file `{name[:80]}` of its data")
    return name


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _fetch(path: Path, size: int, digest: str, sources: Sequence[Source], number: int, name: str) -> None:
    """Have a file from the first source that gives it as it was described. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    said = "nobody has it"
    for source in sources:
        try:
            fetch_pieces([source], _served(number, name), [(0, size)], path, size)
        except OSError as error:
            said = str(error)
            continue
        if _digest(path) == digest:
            return
        said = f"{source[0]}: it has come otherwise than it was"
    raise OSError(f"`{name}` cannot be fetched ({said})")
