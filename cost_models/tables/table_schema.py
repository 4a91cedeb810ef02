"""What a cost table may hold: operations, their axes and units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from plans.errors import RealplanError

FORMAT = "realplan-costs/1"
CALL_VOCAB = 128
"""Vocabulary of the model on which `inference_call` and `train_call` are timed."""
STEP_PROMPT, STEP_TOKENS = 16, 8
"""Tokens of the prompt of which `generate_step` is measured, and of the responses over which it is the mean (on CUDA
of later ones, whose steps replay)."""


class TableError(RealplanError):
    """A cost table that cannot be used: file, key and rule."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What an entry measures: its axes in order, those that are exact, and the unit of its values."""

    axes: tuple[str, ...]
    unit: str = "s"

    @property
    def exact(self) -> frozenset[str]:
        """Axes that are looked up, never interpolated."""
        return frozenset(self.axes) & {"tp", "ranks"}


def _operations() -> dict[str, Operation]:
    tokens, block = ("tp", "tokens"), ("tp", "sequences", "sequence_tokens")
    modules = {
        "embedding_forward": tokens,
        "embedding_backward": tokens,
        "block_forward": block,
        "block_backward": block,
        "block_recompute": block,
        "block_inference": block,
        "block_prefill": block,
        "block_decode": ("tp", "sequences", "cached_tokens"),
        "head_forward": tokens,
        "head_backward": tokens,
        "optimizer_step": ("parameters",),
        "inference_call": block,
        "train_call": block,
        "generate_step": ("tp", "sequences"),
    }
    found = {name: Operation(axes) for name, axes in modules.items()}
    found |= {f"{name}_peak": Operation(axes, "bytes") for name, axes in modules.items()}
    for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "custom_all_reduce"):
        found |= {f"{name}_{place}": Operation(("ranks", "bytes")) for place in ("node", "network", "network_strided")}
    found["gemm_efficiency"] = Operation(("m", "n", "k"), "1")
    found["attention_prefill_efficiency"] = Operation(("lanes", "sequence_tokens"), "1")
    found["attention_decode_efficiency"] = Operation(("lanes", "cached_tokens"), "1")
    return found


OPERATIONS: Mapping[str, Operation] = _operations()
