"""Seals: the size of a file and the checksums of its chunks, by which damage to a checkpoint is found.

CRC-32 of every 8 MiB: twice as fast as SHA-256 where that has instructions of its own, and chunks can be checked by
many threads. It finds every damage within 32 bits and misses one in 2^32 of others; who alters a file on purpose can
alter its index too, whatever the checksum.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

CHUNK_BYTES = 2**23
_PIECE_BYTES = 2**20  # stays in a core's cache between reading and summing
_RUN_BYTES = 8 * CHUNK_BYTES  # one thread reads so much in order: the kernel reads ahead of those who do
_READERS = 8
Checksum = Annotated[int, Field(ge=0, lt=2**32)]


class Seal(BaseModel):
    """Size of a file, and CRC-32 of each of its chunks, of which the last may be shorter. sha256: of the whole file, in
    checkpoints that have no `crc32`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bytes: Annotated[int, Field(ge=0, le=10**15)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    crc32: list[Checksum] | None = None

    @model_validator(mode="after")
    def _has_one(self) -> Seal:
        if (self.sha256 is None) == (self.crc32 is None):
            raise ValueError("a seal has either `crc32` or `sha256`")
        return self


class Sealer:
    """Makes the seal of what passes through it."""

    def __init__(self) -> None:
        self._bytes = 0
        self._crc32: list[int] = []

    def update(self, data: memoryview) -> None:
        """Take up the next bytes; the view's items are bytes."""
        while data:
            within = self._bytes % CHUNK_BYTES
            if not within:
                self._crc32.append(0)
            part = data[: CHUNK_BYTES - within]
            self._crc32[-1] = zlib.crc32(part, self._crc32[-1])
            self._bytes += len(part)
            data = data[len(part) :]

    @property
    def seal(self) -> Seal:
        """Of all bytes so far."""
        return Seal(bytes=self._bytes, crc32=list(self._crc32))


def seal_of(path: Path) -> Seal:
    """The seal of a file."""
    sealer = Sealer()
    for piece in _pieces(path, 0, path.stat().st_size):
        sealer.update(piece)
    return sealer.seal


def altered(folder: Path, seals: Mapping[str, Seal]) -> str:
    """What is wrong with the first file of a folder that is not as it was sealed; empty where all are.

    The files may be larger than memory: they are read in pieces, by several threads, in their order."""
    runs = [(name, at) for name, seal in seals.items() for at in range(0, max(seal.bytes, 1), _run_bytes(seal))]
    with ThreadPoolExecutor(_READERS) as pool:  # reading and summing let other threads run
        found = pool.map(lambda run: _altered_run(folder / run[0], seals[run[0]], run[1]), runs)
        return next((fault for fault in found if fault), "")


def _run_bytes(seal: Seal) -> int:
    return max(seal.bytes, 1) if seal.crc32 is None else _RUN_BYTES


def _altered_run(path: Path, seal: Seal, start: int) -> str:
    """The fault of the first chunk of a run that has one, or of the whole file where the seal knows no chunks."""
    size = path.stat().st_size
    if size != seal.bytes:
        return f"`{path.name}` has {size:,} bytes, not {seal.bytes:,}"
    stop = min(start + _run_bytes(seal), size)
    pieces = _pieces(path, start, stop)
    if seal.crc32 is not None:
        wrong = _altered_chunk(seal.crc32, start, stop, pieces)
    else:
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        wrong = None if digest.hexdigest() == seal.sha256 else (start, stop)
    if wrong is None:
        return ""
    return f"`{path.name}` was altered: bytes {wrong[0]:,} to {wrong[1]:,} are not those that were written"


def _altered_chunk(sums: list[int], start: int, stop: int, pieces: Iterable[memoryview]) -> tuple[int, int] | None:
    """Where the first chunk of a run lies that has not its checksum, or of which a file that ends early has nothing."""
    sealer = Sealer()
    for piece in pieces:
        sealer.update(piece)
    found = dict(zip(range(start, stop, CHUNK_BYTES), sealer.seal.crc32 or (), strict=False))
    for at in range(start, stop, CHUNK_BYTES):
        number = at // CHUNK_BYTES
        if number >= len(sums) or found.get(at) != sums[number]:
            return at, min(at + CHUNK_BYTES, stop)
    return None


def _pieces(path: Path, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes of a part of a file in one buffer, which the next piece overwrites. Ends early where the file does."""
    buffer = memoryview(bytearray(min(_PIECE_BYTES, stop - start)))
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # the kernel reads ahead, farther than by itself
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        file.seek(start)
        while start < stop and (count := file.readinto(buffer[: stop - start])):
            start += count
            yield buffer[:count]
