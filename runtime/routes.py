"""Routes of samples: which experts generation chose for each token (`plans.routes`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plans.model import ModelSpec
from plans.routes import route_bytes


@dataclass(frozen=True, eq=False)
class Routes:
    """Of each sample the experts of its tokens but the last: [tokens - 1, layers with experts, experts per token] each,
    of the type `route_type`. Samples are kept apart, because together they may be gigabytes."""

    rows: tuple[Tensor, ...]

    def take(self, samples: Sequence[int]) -> Routes:
        """Some samples, in the order given."""
        return Routes(tuple(self.rows[i] for i in samples))


def routes_among(inputs: Mapping[str, object]) -> Routes | None:
    """The routes among the inputs of a call; None where it replays none."""
    return next((values for values in inputs.values() if isinstance(values, Routes)), None)


def route_type(spec: ModelSpec) -> torch.dtype:
    """How the number of an expert is stored. Two bytes are read without a sign (`expert_numbers`): torch has few
    operations on its unsigned type."""
    return torch.uint8 if route_bytes(spec) == 1 else torch.int16


def expert_numbers(stored: Tensor) -> Tensor:
    """Numbers of experts, int64, from what is stored."""
    return stored.long() & 0xFFFF
