"""What is there of a checkpoint of which a machine has only the bytes that its ranks read: the rest of its files is
holes, which must not be taken for zeros."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from plans.checkpoint_files import CheckpointError
from plans.files import write_atomically
from plans.flat_tensors import ELEMENT_BYTES, ByteRange, tensor_places

HELD = "held.json"


def resumed_folder(folder: Path, iteration: int) -> Path:
    """Where such a checkpoint stands beside those that are whole."""
    return folder / f".resumed-{iteration}"


def write_held(folder: Path, held: Mapping[str, Iterable[ByteRange]]) -> None:
    """Leave word of the bytes of each file that are there."""
    write_atomically(folder / HELD, json.dumps({name: list(runs) for name, runs in held.items()}))


class Held:
    """What is there of a checkpoint's folder; all of it where nobody has left word."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, dict[str, ByteRange]] = {}
        self._runs: dict[str, list[ByteRange]] | None = None
        if os.path.isfile(folder / HELD):
            text = (folder / HELD).read_text(encoding="utf-8")
            self._runs = {name: [(low, high) for low, high in runs] for name, runs in json.loads(text).items()}

    def check(self, file: str, tensor: str, first: int, last: int) -> None:
        """Raise CheckpointError unless elements [first, last) of a tensor of a file are there."""
        if self._runs is None:
            return
        if file not in self._places:
            self._places[file] = tensor_places(self._folder / file)
        begin = self._places[file][tensor][0]
        low, high = begin + first * ELEMENT_BYTES, begin + last * ELEMENT_BYTES
        if not any(start <= low and high <= stop for start, stop in self._runs.get(file, ())):
            raise CheckpointError(
                f"elements {first} to {last} of `{tensor}` of `{file}` were not fetched to this machine"
            )
