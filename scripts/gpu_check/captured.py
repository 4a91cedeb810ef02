"""Decoding steps as CUDA graphs against the same steps run one by one."""

from __future__ import annotations

from typing import Any

from gpu_check.setting import FIXTURE

PROMPTS = tuple(tuple(range(3 + i, 3 + i + 1 + 3 * i)) for i in range(10))
LIMITS = (40, 9, 17, 33, 5, 25, 40, 12, 21, 38)
"""Most tokens of each response, so that slots empty and fill while steps are replayed."""


def captured_decode(device: Any, groups: Any, dtype: str) -> dict[str, float]:
    """Samples of the fixture whose tokens are the same with graphs and without, as a share, and the largest difference
    of their log-probabilities; in a world of one rank. The slots are fewer than the samples, so rows change hands."""
    import torch

    from plans.layout import Layout
    from plans.library import load_model
    from runtime.generation.generate import FlightLimits, generate
    from runtime.generation.sampling import Sampling
    from runtime.models.model import build_model
    from runtime.weights.hf import load_weights

    layout = Layout(load_model(str(FIXTURE)), (0,))
    model = build_model(layout, groups.collection(layout), dtype=getattr(torch, dtype), device=device)
    load_weights(model, FIXTURE)
    with_graphs, without = (
        generate(
            model, PROMPTS, range(len(PROMPTS)), response_tokens=LIMITS, sampling=Sampling(), seed=1, iteration=0,
            limits=FlightLimits(slots=4, burst=4, capture=capture),
        )
        for capture in (True, False)
    )  # fmt: skip
    pairs = zip(with_graphs.sequences.texts(), without.sequences.texts(), strict=True)
    same = [found == wanted for found, wanted in pairs]
    share = sum(same) / len(same)
    error = float((with_graphs.logprobs - without.logprobs).abs().max()) if share == 1 else float("inf")
    return {"same": share, "error": error}
