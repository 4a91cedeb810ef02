"""Where the weights of a block's experts lie: evenly spaced, so that one product can run all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def lay_out_experts(chunk: nn.Module) -> None:
    """Have the weights of the experts of each block of a model chunk side by side, each kind in one storage."""
    for module in chunk.modules():
        experts: Any = getattr(module, "local_experts", ())
        for kind in ("linear_fc1", "linear_fc2"):
            weights = [getattr(expert, kind).weight for expert in experts]
            if weights:
                for weight, place in zip(weights, torch.stack([w.data for w in weights]), strict=True):
                    weight.data = place


def evenly_spaced(weights: Sequence[Tensor]) -> Tensor | None:
    """A view [n, ...] of weights alike that lie at even distances in one storage, the first of them first; None of
    others. A trainer moves weights into buffers of its own, in the opposite order."""
    first, size = weights[0], weights[0].element_size()
    if any(w.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for w in weights):
        return None
    places = [(w.data_ptr() - first.data_ptr()) // size for w in weights]
    step = places[1] if len(places) > 1 else first.numel()
    if step <= 0 or not first.is_contiguous() or places != [i * step for i in range(len(weights))]:
        return None
    return first.detach().as_strided((len(weights), *first.shape), (step, *first.stride()))
