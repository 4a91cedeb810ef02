"""When a decoding step becomes a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """Recorded work on static buffers."""

    def replay(self) -> None: ...


class CapturedSteps:
    """Runs steps, and records those whose shape comes again.

    `record` turns a step into a graph without running it; None runs every step as it is, as on the CPU. The first step
    of a shape runs uncaptured: it loads kernels and opens communicators, which a recording must not. Recording takes
    the host as long as a step does, so that it pays from the third step on.
    """

    def __init__(self, record: Callable[[Callable[[], None]], Graph] | None) -> None:
        self._record = record
        self._met: set[Hashable] = set()
        self._graphs: dict[Hashable, Graph] = {}

    def of(self, shape: Hashable, step: Callable[[], None]) -> Callable[[], None]:
        """What to call for each step of one burst. A shape always means the same work on the same buffers."""
        if self._record is None:
            return step
        record = self._record

        def run() -> None:
            if shape not in self._met:
                self._met.add(shape)
                step()
                return
            if shape not in self._graphs:
                self._graphs[shape] = record(step)
            self._graphs[shape].replay()

        return run


def cuda_recorder() -> Callable[[Callable[[], None]], Graph]:
    """Records CUDA graphs, NCCL included, that share one memory pool: only one of them runs at a time."""
    pool: Any = torch.cuda.graph_pool_handle()

    def record(step: Callable[[], None]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog) may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
        return graph

    return record
