"""Decoding, timed as generation runs it: step by step on the CPU, as a recorded graph on a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import ceil, inf

import torch

from cost_models.tables.shards import call_spec
from cost_models.tables.table_schema import CALL_VOCAB, STEP_TOKENS
from plans.kvcache import BURST_STEPS
from plans.model import ModelSpec
from profiler.alone import single_rank_model
from profiler.timers import Timed
from runtime.generation.attention import Pool, paged_attention, row_attention, suited_block
from runtime.generation.capture import cuda_recorder
from runtime.generation.lean import Attend, LeanStage
from runtime.groups import GroupCache

CACHE_BYTES = 2**28
"""Weights of so many bytes leave no part of themselves in a GPU's cache (50 MB of an H100, 126 MB of a B200): a step
reads every layer from memory, and so must layers that are timed again and again."""
MOST_LAYERS = 8
GRAPH_LAYERS = 16
"""Layers of one recorded graph, beside which the launch of the graph is little."""
REPLAYED_TOKENS = 8 * BURST_STEPS


class DecodingShard:
    """Layers of a shard as generation uses them: one on the CPU, and on a GPU as many as its cache does not hold."""

    def __init__(self, spec: ModelSpec, groups: GroupCache, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype, layers = device, dtype, 1
        if device.type == "cuda":
            layers = min(MOST_LAYERS, ceil(CACHE_BYTES / (spec.layer_params * dtype.itemsize)))
        model = single_rank_model(replace(call_spec(spec, CALL_VOCAB), layers=layers), groups, device, dtype)
        self._stage = LeanStage(model, inf)

    def block(self, sequences: int, cached_tokens: int) -> Timed:
        """A token of each slot through a block, on `cached_tokens` before it."""
        stage, device = self._stage, self._device
        hidden = torch.randn(sequences, stage.model.spec.hidden, device=device, dtype=self._dtype)
        last = torch.full((sequences,), cached_tokens, device=device)
        rotation = stage.rotation(cached_tokens + 1)[last]
        attend = self._attend(sequences, cached_tokens, last)

        def steps(count: int) -> None:
            with torch.inference_mode():
                for _ in range(count):
                    stage.layers(hidden, rotation, attend)

        if device.type == "cpu":
            return Timed(lambda _: steps(1), times=len(stage.blocks))
        steps(1)  # loads kernels, which a recording must not
        count = ceil(GRAPH_LAYERS / len(stage.blocks))
        graph = cuda_recorder()(partial(steps, count))
        return Timed(lambda _: graph.replay(), times=count * len(stage.blocks))

    def _attend(self, sequences: int, cached_tokens: int, last: torch.Tensor) -> Attend:
        """Attention on a cache of whole rows, or on blocks where generation has them."""
        stage, size = self._stage, cached_tokens + 1
        block = suited_block(self._device, self._dtype)
        if not block:
            return row_attention(stage, Pool(stage, sequences, size), sequences, size, last)
        width = ceil(size / block)
        tables = torch.arange(sequences * width, device=self._device).view(sequences, width)
        return paged_attention(stage, Pool(stage, sequences * width, block), tables, last)


def step_spans(device: torch.device) -> tuple[int, int]:
    """Response tokens of the longer and the shorter of two generations, whose difference is made of alike steps: on a
    GPU of replayed ones, behind the burst that records."""
    if device.type == "cuda":
        return BURST_STEPS + REPLAYED_TOKENS, BURST_STEPS
    return 1 + STEP_TOKENS, 1
