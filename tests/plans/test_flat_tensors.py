"""Headers of safetensors files, written by hand: what holds the wanted tensors, and what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plans.flat_tensors import tensors_fault

WHOLE = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}


def file(path: Path, header: object, data: bytes = bytes(12)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_wanted_tensors_are_there(tmp_path: Path) -> None:
    path = file(tmp_path / "a.safetensors", {"__metadata__": {}, "x": WHOLE, "y": WHOLE})
    assert tensors_fault(path, {"x": 3}) == "" and tensors_fault(path, {}) == ""


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({}, bytes(12), "lacks tensor `x`"),
        ({"x": 3}, bytes(12), "lacks tensor `x`"),
        ({"x": WHOLE | {"shape": [4]}}, bytes(12), "is F32 [4], not F32 [3]"),
        ({"x": WHOLE | {"shape": [1, 3]}}, bytes(12), "is F32 [1, 3], not F32 [3]"),
        ({"x": WHOLE | {"dtype": "BF16"}}, bytes(12), "is BF16 [3], not F32 [3]"),
        ({"x": WHOLE}, bytes(11), "lies beyond its file"),
        ({"x": WHOLE | {"data_offsets": [-12, 0]}}, bytes(12), "lies beyond its file"),
        ({"x": WHOLE | {"data_offsets": [0, 8]}}, bytes(12), "lies beyond its file"),
        ({"x": WHOLE | {"data_offsets": "all"}}, bytes(12), "lies beyond its file"),
        ([], bytes(12), "is no object"),
        (b'{"x": ', b"", "has no header of JSON"),
        (b"\xff\xff", b"", "has no header of JSON"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, header: object, data: bytes, words: str) -> None:
    assert words in tensors_fault(file(tmp_path / "a.safetensors", header, data), {"x": 3})


def test_a_file_that_is_too_short_or_announces_too_much(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"")
    assert "has no header of JSON" in tensors_fault(path, {"x": 3})
    path.write_bytes(bytes([255] * 8))
    assert "has a header of 18,446,744,073,709,551,615 bytes" in tensors_fault(path, {"x": 3})
