"""A small batch whose samples have 5, 1, 3 and no tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runtime.algorithms.samples import Samples, response_mask

LENGTHS = torch.tensor([5, 1, 3, 0])
R = 5
MASK = response_mask(LENGTHS, R)


def random(seed: int) -> Tensor:
    return torch.randn(len(LENGTHS), R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples(**more: Any) -> Samples:
    """The whole batch on one replica, two samples per prompt."""
    fields: dict[str, Any] = {
        "rows": torch.arange(4),
        "group_size": 2,
        "mask": MASK,
        "old_logprobs": random(0),
        "ref_logprobs": random(1),
        "scores": torch.tensor([1.0, -20.0, 0.5, 9.0]).double(),
        "kept": torch.ones(4, dtype=torch.bool),
        "gather": lambda own: own,
    }
    return Samples(**fields | more)
