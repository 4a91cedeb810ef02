"""The weights of a run on one machine: those that are there, and in the place of a folder that is not, what its ranks
read of it, from a machine that has it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from plans.errors import RealplanError
from plans.flat_tensors import WORD_BYTES, ByteRange, header_bytes
from plans.plan import ExecutionPlan
from plans.runfile import RunFile
from runtime.batches.tokenizer import FILES
from runtime.machines.files import FileServer, Source, fetch_pieces
from runtime.machines.named import weight_folders
from runtime.machines.wire import Message
from runtime.weights.hf_files import note_origin
from runtime.weights.needed import needed_pieces

Pieces = dict[str, list[ByteRange]]

MOST_SMALL_BYTES = 2**26
"""Of a file beside the weights, such as a tokenizer's, that goes with them."""
_SAMPLES, _SAMPLE_BYTES = 16, 2**12
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


class WeightFolders:
    """The folders of a run's weights on a machine. files: serves those that are there. node: this machine's."""

    def __init__(self, run: RunFile, files: FileServer, node: int) -> None:
        self._run, self._files = run, files
        self.place = Path(run.output) / f".weights-{node}"
        """Where slices lie of folders that are not there: files of the right size with holes."""
        self._held: dict[Path, set[ByteRange]] = {}

    def close(self) -> None:
        """Remove what was fetched."""
        if self._held:
            shutil.rmtree(self.place, ignore_errors=True)
            with suppress(OSError):  # where nothing else is in it, it was made for this
                self.place.parent.rmdir()

    def describe(self) -> Message:
        """By number the folders that are there: sizes of their files, and a mark of what they hold. They are served
        from now on."""
        found = {}
        for number, folder in enumerate(weight_folders(self._run)):
            if os.path.isdir(folder):
                tensors, small = _files_of(Path(folder))
                for name in (*tensors, *small):
                    self._files.more[_served(number, name)] = Path(folder) / name
                found[str(number)] = {"tensors": tensors, "small": small, "mark": _mark(Path(folder), tensors, small)}
        return {"folders": found}

    def fetch(
        self, plan: ExecutionPlan, ranks: Sequence[int] | None, folders: Mapping[str, Any], *, resumed: bool = False
    ) -> Message:
        """Have what some ranks of a plan read of folders, or all of them (None). folders: by number what `describe`
        says of them, and the sources. resumed: the run goes on from a checkpoint. Says how many bytes have come. Raises
        OSError and RealplanError."""
        names = weight_folders(self._run)
        if not self._held:
            shutil.rmtree(self.place, ignore_errors=True)  # of a process that was killed
        come = 0
        for number, of in folders.items():
            wanted = None if ranks is None else partial(needed_pieces, plan, self._run, ranks=ranks, resumed=resumed)
            come += self._fetch(int(number), names[int(number)], of, wanted)
        return {"bytes": come}

    def _fetch(self, number: int, folder: str, of: Any, wanted: Callable[..., Pieces] | None) -> int:
        here, sources = self.place / str(number), [tuple(source) for source in of["sources"]]
        here.mkdir(parents=True, exist_ok=True)
        note_origin(here, folder)
        come = 0
        for name, size in of["small"].items():
            come += self._have(here / name, size, [(0, size)], sources, number)
        for name, size in of["tensors"].items():
            come += self._have(here / name, size, [(0, WORD_BYTES)], sources, number)
            come += self._have(
                here / name, size, [(WORD_BYTES, WORD_BYTES + header_bytes(here / name))], sources, number
            )
        pieces = {name: [(0, size)] for name, size in of["tensors"].items()}
        if wanted is not None:
            pieces = wanted(folder=folder, here=here)
        self._check_room(folder, pieces)
        for name, needed in pieces.items():
            come += self._have(here / name, of["tensors"][name], needed, sources, number)
        return come

    def _have(self, path: Path, size: int, pieces: Sequence[ByteRange], sources: Sequence[Source], number: int) -> int:
        """Have pieces of a file, those that are not there yet; how many bytes have come."""
        held = self._held.setdefault(path, set())
        new = [piece for piece in pieces if piece not in held]
        if new:
            fetch_pieces(sources, _served(number, path.name), new, path, size)
            held.update(new)
        return sum(stop - start for start, stop in new)

    def _check_room(self, folder: str, pieces: Mapping[str, Sequence[ByteRange]]) -> None:
        free = shutil.disk_usage(self.place).free
        need = sum(stop - start for parts in pieces.values() for start, stop in parts)
        if free < need:
            raise RealplanError(
                f"its ranks read {need / 2**30:.1f} GiB of weights `{folder}`, which is not on this machine; "
                f"`{self.place.parent}` has room for {free / 2**30:.1f} GiB",
                "output=FOLDER on a disk with room, or the weights on every machine",
            )

    @property
    def placed(self) -> dict[str, str]:
        """Where a folder that is not there lies instead."""
        own = [(folder, self.place / str(number)) for number, folder in enumerate(weight_folders(self._run))]
        return {folder: str(place) for folder, place in own if self._held and os.path.isdir(place)}


def _served(number: int, name: str) -> str:
    return f"weights/{number}/{name}"


def _files_of(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of the files with the tensors of a folder, and of the small ones beside them."""
    from runtime.weights.hf_files import WeightFiles

    tensors = sorted(set(WeightFiles(folder, "np").files.values()))
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if os.path.isfile(path)}
    small = {
        name: size
        for name, size in sorted(sizes.items())
        if not name.startswith(".") and not name.endswith(_OTHER_WEIGHTS) and size <= MOST_SMALL_BYTES
    }
    return {name: sizes[name] for name in tensors}, small


def _mark(folder: Path, tensors: Mapping[str, int], small: Mapping[str, int]) -> str:
    """A digest of the headers of files and of samples of their content, and of the tokenizer: copies have the same one,
    other weights of the same shape another one."""
    digest = hashlib.sha256()
    for name in (name for name in FILES if name in small):
        digest.update(f"{name} {small[name]}\n".encode() + (folder / name).read_bytes())
    for name, size in tensors.items():
        digest.update(f"{name} {size}\n".encode())
        with (folder / name).open("rb") as file:
            digest.update(file.read(WORD_BYTES + header_bytes(folder / name)))
            for sample in range(_SAMPLES):
                file.seek(max(size - _SAMPLE_BYTES, 0) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
