"""A world of one rank in this process, which the runtime's models ask for, and such models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from plans.layout import Layout
from plans.model import ModelSpec
from runtime.groups import GroupCache
from runtime.models.installation import install
from runtime.models.model import Model, build_model


@contextmanager
def alone(device: torch.device) -> Iterator[GroupCache]:
    """Make the process group of one rank while this holds."""
    install(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    groups = GroupCache(device)
    try:
        yield groups
    finally:
        groups.close()
        dist.destroy_process_group()


def single_rank_model(spec: ModelSpec, groups: GroupCache, device: torch.device, dtype: torch.dtype) -> Model:
    """A model on this rank alone, weights normal. The process group must hold one rank."""
    layout = Layout(spec, (0,))
    model = build_model(layout, groups.collection(layout), dtype=dtype, device=device)
    with torch.no_grad():
        for parameter in model.chunks[0].parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(1.0)
    return model
