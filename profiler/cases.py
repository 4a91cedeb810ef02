"""Cases: which operations are timed at which sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Sizes = tuple[int, ...]
Axes = Mapping[str, Sizes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cases:
    """Sizes of the axes of a cost table.

    tokens: of embedding and head. sequences, sequence_tokens: of a block's passes. rows, cached_tokens: of decoding.
    call_sequences, call_tokens: of whole calls. budget_s: time for the repeats of one point.
    """

    tokens: Sizes
    sequences: Sizes
    sequence_tokens: Sizes
    rows: Sizes
    cached_tokens: Sizes
    call_sequences: Sizes
    call_tokens: Sizes
    budget_s: float


GPU = Cases(
    tokens=(256, 2048, 8192),
    sequences=(1, 4),
    sequence_tokens=(256, 1024, 4096),
    rows=(1, 16, 64, 256),
    cached_tokens=(256, 1024, 4096),
    call_sequences=(1, 4),
    call_tokens=(256, 1024),
    budget_s=0.1,
)
CPU = Cases(
    tokens=(16, 64, 256, 1024),
    sequences=(1, 4, 16),
    sequence_tokens=(16, 64, 128),
    rows=(1, 4, 16, 64),
    cached_tokens=(16, 64, 256),
    call_sequences=(1, 4),
    call_tokens=(16, 64),
    budget_s=0.15,
)
MODULES = ("embedding_forward", "embedding_backward", "head_forward", "head_backward")
BLOCKS = ("block_forward", "block_backward", "block_recompute", "block_inference", "block_prefill")
CALLS = ("inference_call", "train_call")


def grids(cases: Cases) -> dict[str, Axes]:
    """Operation -> axes without tp, in the order in which they are timed."""
    block = {"sequences": cases.sequences, "sequence_tokens": cases.sequence_tokens}
    calls = {"sequences": cases.call_sequences, "sequence_tokens": cases.call_tokens}
    found: dict[str, Axes] = {name: {"tokens": cases.tokens} for name in MODULES}
    found |= dict.fromkeys(BLOCKS, block)
    found["block_decode"] = {"sequences": cases.rows, "cached_tokens": cases.cached_tokens}
    found["generate_step"] = {"sequences": cases.rows}
    return found | dict.fromkeys(CALLS, calls)
