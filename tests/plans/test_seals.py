"""Seals of files: their size and the checksums of their chunks."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import pytest
from pydantic import ValidationError

from plans.seals import CHUNK_BYTES, Seal, Sealer, altered, seal_of


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 17])
def test_a_seal_is_the_size_and_a_checksum_per_chunk(size: int, tmp_path: Path) -> None:
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "file").write_bytes(content)
    assert CHUNK_BYTES == 8 * 1024 * 1024
    chunks = [content[at : at + CHUNK_BYTES] for at in range(0, size, CHUNK_BYTES)]
    seal = Seal(bytes=size, crc32=[zlib.crc32(chunk) for chunk in chunks])
    assert seal_of(tmp_path / "file") == seal
    sealer = Sealer()
    for at in range(0, size, CHUNK_BYTES // 3 + 1):  # in pieces that cross the ends of chunks
        sealer.update(memoryview(content)[at : at + CHUNK_BYTES // 3 + 1])
    assert sealer.seal == seal
    assert not altered(tmp_path, {"file": seal})
    assert not altered(tmp_path, {"file": Seal(bytes=size, sha256=hashlib.sha256(content).hexdigest())})


def test_the_check_value_of_the_crc_catalogue(tmp_path: Path) -> None:
    """CRC-32/ISO-HDLC of these nine digits."""
    (tmp_path / "file").write_bytes(b"123456789")
    assert seal_of(tmp_path / "file").crc32 == [0xCBF43926]


@pytest.mark.parametrize("place", [0, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 99, 9 * CHUNK_BYTES])
def test_one_flipped_bit_is_found_in_its_chunk(place: int, tmp_path: Path) -> None:
    """Also beyond the 64 MiB that one thread reads."""
    size = max(place, CHUNK_BYTES) + 100
    content = bytearray(size)
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(content)
    seals = {name: seal_of(tmp_path / name) for name in ("first", "second")}
    content[place] ^= 16
    (tmp_path / "second").write_bytes(content)
    first = place // CHUNK_BYTES * CHUNK_BYTES
    last = min(first + CHUNK_BYTES, size)
    wrong = "`second` was altered: bytes {:,} to {:,} are not those that were written"
    assert altered(tmp_path, seals) == wrong.format(first, last)
    old = seals | {"second": Seal(bytes=size, sha256=hashlib.sha256(bytes(size)).hexdigest())}
    assert altered(tmp_path, old) == wrong.format(0, size)
    (tmp_path / "second").write_bytes(content[:-1])
    assert altered(tmp_path, seals) == f"`second` has {size - 1:,} bytes, not {size:,}"


def test_a_seal_without_checksums_is_none() -> None:
    for sums in ({}, {"crc32": [1], "sha256": "0" * 64}):
        with pytest.raises(ValidationError, match="either `crc32` or `sha256`"):
            Seal(bytes=1, **sums)
    seal = Seal(bytes=CHUNK_BYTES + 1, crc32=[0])
    assert Seal.model_validate_json(seal.model_dump_json(exclude_none=True)) == seal


def test_a_chunk_without_its_checksum_is_altered(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(CHUNK_BYTES + 1))
    whole = seal_of(tmp_path / "file")
    assert whole.crc32 is not None
    assert "`file` was altered" in altered(tmp_path, {"file": Seal(bytes=whole.bytes, crc32=whole.crc32[:1])})
