"""Decoding steps as CUDA graphs against the same steps run one by one."""

from __future__ import annotations

from typing import Any

from gpu_check.setting import FIXTURE
from plans.library import load_model
from plans.model import ModelSpec

PROMPTS = tuple(tuple(range(3 + i, 3 + i + 1 + 3 * i)) for i in range(10))
LIMITS = (40, 9, 17, 33, 5, 25, 40, 12, 21, 38)
"""Most tokens of each response, so that slots empty and fill while steps are replayed."""


def captured_decode(device: Any, groups: Any, dtype: str, spec: ModelSpec | None = None) -> dict[str, float]:
    """Samples of the fixture, or of a model with random weights, whose tokens are the same with graphs and without, as
    a share, and the largest difference of their log-probabilities; in a world of one rank. The slots are fewer than the
    samples, so rows change hands."""
    import torch

    from plans.layout import Layout
    from runtime.generation.generate import FlightLimits, generate
    from runtime.generation.sampling import Sampling
    from runtime.models.model import build_model
    from runtime.weights.hf import load_weights, random_weights

    layout = Layout(spec or load_model(str(FIXTURE)), (0,))
    model = build_model(layout, groups.collection(layout), dtype=getattr(torch, dtype), device=device)
    if spec is None:
        load_weights(model, FIXTURE)
    else:
        random_weights(model, 1)
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


def experts_together(device: Any, groups: Any, spec: ModelSpec) -> dict[str, float]:
    """The largest error, over the largest number, of a block of experts in bf16 that runs as decoding does, against
    each expert on the rows that chose it; and whether decoding has one product for all experts."""
    import torch

    from plans.layout import Layout
    from runtime.generation.experts import LeanExperts
    from runtime.models.model import build_model
    from runtime.weights.hf import random_weights

    layout = Layout(spec, (0,))
    model = build_model(layout, groups.collection(layout), dtype=torch.bfloat16, device=device)
    random_weights(model, 1)
    experts = LeanExperts(model, model.chunks[0].decoder.layers[0].mlp)
    x = torch.randn(24, spec.hidden, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    with torch.inference_mode():
        found, wanted = experts(x), experts(x, rows=len(x))
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return {"error": error, "one product": float(experts.way(x, 0) == experts.grouped)}
