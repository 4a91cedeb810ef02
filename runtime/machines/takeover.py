"""A checkpoint that lies on several machines, on one of them: what is here is used where it is, of the rest only the
chunks that the ranks of the machine read come over the network."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from plans.checkpoint_files import INDEX, Checkpoint, open_checkpoint, step_folder
from plans.flat_tensors import WORD_BYTES, ByteRange, header_bytes, joined_ranges
from plans.plan import ExecutionPlan
from plans.seals import CHUNK_BYTES, altered
from runtime.checkpoints.held import resumed_folder, write_held
from runtime.checkpoints.needed import FileBytes, master_bytes, needed_bytes
from runtime.checkpoints.room import Need, check_needs
from runtime.machines.files import Wanted, fetch, fetch_pieces
from runtime.machines.wire import Message

Needs = Callable[[Checkpoint], Iterable[FileBytes]]
"""What is needed of a checkpoint, in no order and some of it twice."""


def take_needed(
    folder: Path,
    iteration: int,
    plan: ExecutionPlan,
    ranks: Sequence[int],
    files: Sequence[Wanted],
    other: Path | None = None,
) -> Message:
    """Have in `resumed_folder` of a folder what some ranks of a plan read of a checkpoint, every byte of it as it was
    sealed. Says how many bytes have come. other: the folder of checkpoints of another run, one of which it is (None: of
    `folder`). Raises OSError, RealplanError where there is no room for them, and CheckpointError for a checkpoint that
    contradicts itself."""
    return _take(folder, iteration, files, lambda checkpoint: needed_bytes(checkpoint, plan, ranks), other)


def served_name(step: str, *, other: bool) -> str:
    """Under which name machines serve the files of a checkpoint: of the run's own, or of the other one that it goes on
    from."""
    return f"other/{step}" if other else step


def take_masters(folder: Path, iteration: int, role: str, files: Sequence[Wanted]) -> Message:
    """Have there what an export of a role reads."""
    return _take(folder, iteration, files, lambda checkpoint: master_bytes(checkpoint, role))


def _take(folder: Path, iteration: int, files: Sequence[Wanted], needs: Needs, other: Path | None = None) -> Message:
    final, place = step_folder(other or folder, iteration), resumed_folder(folder, iteration)
    step = served_name(final.name, other=other is not None)
    # What is here of the same name may be of another run: its files are another one's, even where sizes agree.
    index = {wanted.name: wanted.seal for wanted in files if wanted.name == INDEX}
    same = os.path.isfile(final / INDEX) and not altered(final, index)
    drop_resumed(folder, but=place)
    place.mkdir(parents=True, exist_ok=True)
    chunked, come = dict[str, _Chunks](), 0
    for wanted in files:
        linked = same and _link(final / wanted.name, place / wanted.name, wanted.seal.bytes)
        if wanted.name.endswith(".safetensors") and wanted.seal.crc32 is not None:
            file = chunked[wanted.name] = _Chunks(place / wanted.name, wanted, step)
            file.have([0])
            file.have(_chunks([(0, WORD_BYTES + header_bytes(file.path))]))
        else:
            fetch(place, wanted, step)
            come += 0 if linked else wanted.seal.bytes
    runs: dict[str, list[ByteRange]] = {name: [] for name in chunked}
    for name, start, stop in needs(open_checkpoint(place)):
        if name in runs:
            runs[name].append((start, stop))
    size = sum(file.lacks(_chunks(runs[name])) for name, file in chunked.items())
    hint = "checkpoint.folder=FOLDER on another disk, with the checkpoints moved there"
    check_needs(
        [Need(f"what is read here of checkpoint {iteration}, and is on other machines, needs", place, size, hint)]
    )
    for name, file in chunked.items():
        file.have(_chunks(runs[name]))
    held = {name: file.runs for name, file in chunked.items()}
    write_held(place, held | {w.name: [(0, w.seal.bytes)] for w in files if w.name not in held})
    return {"bytes": come + sum(file.come for file in chunked.values())}


def drop_resumed(folder: Path, but: Path | None = None) -> None:
    """Remove what was taken of checkpoints."""
    for path in folder.glob(resumed_folder(folder, 0).name.replace("0", "*")):
        if path != but:
            shutil.rmtree(path, ignore_errors=True)


class _Chunks:
    """A file of which some chunks are here and as they were sealed, and the bytes that came for it."""

    def __init__(self, path: Path, wanted: Wanted, step: str) -> None:
        self.path, self._wanted, self._step = path, wanted, step
        self._right: set[int] = set()
        self.come = 0

    def have(self, numbers: Iterable[int]) -> None:
        """Have some chunks, from the first source that has each as it was sealed. Raises OSError."""
        left, said = self._wrong(numbers), "nobody has it"
        for source in self._wanted.sources:
            if not left:
                break
            pieces = self._joined(left)
            try:
                fetch_pieces([source], f"{self._step}/{self._wanted.name}", pieces, self.path, self._wanted.seal.bytes)
                self.come += sum(stop - start for start, stop in pieces)
            except OSError as error:
                said = str(error)
            left = self._wrong(left)
        if left:
            raise OSError(f"`{self._step}/{self._wanted.name}` cannot be had as it was written ({said})")

    def lacks(self, numbers: Iterable[int]) -> int:
        """Bytes of those chunks that are not here, or not as they were sealed."""
        return sum(stop - start for start, stop in self._joined(self._wrong(numbers)))

    @property
    def runs(self) -> list[ByteRange]:
        """The bytes that are here."""
        return self._joined(self._right)

    def _wrong(self, numbers: Iterable[int]) -> list[int]:
        """Those chunks that are not here, or not as they were sealed."""
        sums = self._wanted.seal.crc32 or []
        unknown = [number for number in sorted(set(numbers)) if number not in self._right]
        if not os.path.isfile(self.path) or self.path.stat().st_size != self._wanted.seal.bytes:
            return unknown
        with self.path.open("rb") as file:
            for number in unknown:
                file.seek(number * CHUNK_BYTES)
                if zlib.crc32(file.read(CHUNK_BYTES)) == sums[number]:
                    self._right.add(number)
        return [number for number in unknown if number not in self._right]

    def _joined(self, numbers: Iterable[int]) -> list[ByteRange]:
        starts = (number * CHUNK_BYTES for number in numbers)
        return joined_ranges((start, min(start + CHUNK_BYTES, self._wanted.seal.bytes)) for start in starts)


def _chunks(runs: Iterable[ByteRange]) -> set[int]:
    """The chunks in which bytes lie."""
    return {number for start, stop in runs for number in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES))}


def _link(there: Path, here: Path, size: int) -> bool:
    """Use a file of this machine where it lies, if it has its size; whether it is."""
    with suppress(OSError):  # there is none, or the file system knows no links
        if there.stat().st_size == size and not os.path.lexists(here):
            os.link(there, here)
    return os.path.isfile(here) and here.stat().st_size == size
