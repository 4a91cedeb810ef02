"""A world of one rank in this process, which the runtime's models ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from runtime.groups import GroupCache
from runtime.models.installation import install


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
