"""Seals: the size of a file and the checksums of its chunks, by which damage to a checkpoint is found.

CRC-32 of every 8 MiB: twice as fast as SHA-256 where that has instructions of its own, and chunks can be checked by
many threads. It finds every damage within 32 bits and misses one in 2^32 of others; who alters a file on purpose can
alter its index too, whatever the checksum.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

CHUNK_BYTES = 2**23
_PIECE_BYTES = 2**20  # stays in a core's cache between reading and summing
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
    chunks = [(name, at) for name, seal in seals.items() for at in range(0, max(seal.bytes, 1), _step(seal))]
    with ThreadPoolExecutor(_READERS) as pool:  # reading and summing let other threads run
        found = pool.map(lambda chunk: _altered_chunk(folder / chunk[0], seals[chunk[0]], chunk[1]), chunks)
        return next((fault for fault in found if fault), "")


def _step(seal: Seal) -> int:
    return max(seal.bytes, 1) if seal.crc32 is None else CHUNK_BYTES


def _altered_chunk(path: Path, seal: Seal, start: int) -> str:
    """The fault of one chunk, or of the whole file where the seal knows no chunks."""
    size = path.stat().st_size
    if size != seal.bytes:
        return f"`{path.name}` has {size:,} bytes, not {seal.bytes:,}"
    stop = min(start + _step(seal), size)
    if seal.crc32 is None:
        digest = hashlib.sha256()
        for piece in _pieces(path, start, stop):
            digest.update(piece)
        right = digest.hexdigest() == seal.sha256
    else:
        checksum = 0
        for piece in _pieces(path, start, stop):
            checksum = zlib.crc32(piece, checksum)
        number = start // CHUNK_BYTES
        right = start == stop or seal.crc32[number : number + 1] == [checksum]
    return "" if right else f"`{path.name}` was altered: bytes {start:,} to {stop:,} are not those that were written"


def _pieces(path: Path, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes of a part of a file in one buffer, which the next piece overwrites. Ends early where the file does."""
    buffer = memoryview(bytearray(min(_PIECE_BYTES, stop - start)))
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # the disk reads a whole chunk while its first piece is summed
            os.posix_fadvise(file.fileno(), start, min(stop - start, CHUNK_BYTES), os.POSIX_FADV_WILLNEED)
        file.seek(start)
        while start < stop and (count := file.readinto(buffer[: stop - start])):
            start += count
            yield buffer[:count]
