"""Files of flat float32 tensors as ranks write them into a checkpoint, made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence

from plans.checkpoint_files import MASTER, MOMENTS, StoredEntry


def flat_header(entries: Sequence[StoredEntry]) -> tuple[bytes, int]:
    """What stands before the tensors of entries in a safetensors file, and how many bytes they have."""
    header, at = {}, 0
    for kind in (MASTER, *MOMENTS):
        for stored in entries:
            end = at + 4 * stored.entry.size
            header[stored.tensor(kind)] = {"dtype": "F32", "shape": [stored.entry.size], "data_offsets": [at, end]}
            at = end
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text, at
