"""What a safetensors file says it holds; read from its header, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from plans.documents import BadText, parse_json
from plans.problems import shortened

MOST_HEADER_BYTES = 2**27
WORD_BYTES = 8
ELEMENT_BYTES = 4
ByteRange = tuple[int, int]
"""Bytes of a file: from, and up to."""


def tensors_fault(path: Path, wanted: Mapping[str, int]) -> str:
    """Why a file does not hold the wanted tensors (name -> elements), float32 and flat; empty when it does.

    A header is the length of a JSON text in eight bytes, little-endian, and that text: for each tensor its dtype, its
    shape, and where its bytes lie after the header (https://huggingface.co/docs/safetensors).
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(WORD_BYTES), "little")
        if size > MOST_HEADER_BYTES:
            return f"`{path.name}` has a header of {size:,} bytes"
        text = file.read(size)
    try:
        header = parse_json(text.decode("utf-8"))
    except (UnicodeDecodeError, BadText):
        return f"`{path.name}` has no header of JSON"
    if not isinstance(header, dict):
        return f"the header of `{path.name}` is no object"
    room = path.stat().st_size - WORD_BYTES - size
    for name, elements in wanted.items():
        found = header.get(name)
        if not isinstance(found, dict):
            return f"`{path.name}` lacks tensor `{name}`"
        if (found.get("dtype"), found.get("shape")) != ("F32", [elements]):
            held = shortened(f"{found.get('dtype')} {found.get('shape')}")
            return f"tensor `{name}` of `{path.name}` is {held}, not F32 [{elements}]"
        match found.get("data_offsets"):
            case [int(begin), int(end)] if begin >= 0 and end - begin == ELEMENT_BYTES * elements and end <= room:
                continue
        return f"tensor `{name}` of `{path.name}` lies beyond its file"
    return ""


def header_bytes(path: Path) -> int:
    """Length of the header of a safetensors file, which stands after `WORD_BYTES`."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(WORD_BYTES), "little")


def joined_ranges(ranges: Iterable[ByteRange]) -> list[ByteRange]:
    """The same bytes, ascending, in as few ranges as can be."""
    found: list[ByteRange] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found


def tensor_places(path: Path) -> dict[str, ByteRange]:
    """By name, from which byte of a safetensors file up to which a tensor lies. Its header must be sound."""
    size = header_bytes(path)
    with path.open("rb") as file:
        file.seek(WORD_BYTES)
        header = parse_json(file.read(size).decode("utf-8"))
    assert isinstance(header, dict), "the file was checked"
    places = {name: found["data_offsets"] for name, found in header.items() if name != "__metadata__"}
    return {name: (WORD_BYTES + size + begin, WORD_BYTES + size + end) for name, (begin, end) in places.items()}
