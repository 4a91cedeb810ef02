"""The model to beat: one constant x FLOPs x pipeline bubble, with the constant fitted to each group of rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cost_models.validation.published import Row, number, ppo_cluster, row_cluster, row_gpus, row_spec, whole
from cost_models.validation.row_layouts import row_dp
from plans.library import load_model
from plans.model import ModelSpec


def naive_cost(row: Row, quantity: str) -> float:
    """FLOPs per GPU times the bubble: proportional to time under the strawman, in no unit."""
    if quantity == "step_time_s":
        return _training(row)
    if quantity == "iteration_s":
        return _iteration(row)
    cluster, spec = row_cluster(row), row_spec(row)
    batch, prompt = number(row, "batch"), number(row, "input_len")
    decoded = {"prefill_ms": 0.0, "decode_ms_per_token": 1.0}.get(quantity, number(row, "output_len") - 1)
    tokens = batch * (decoded + (prompt if quantity != "decode_ms_per_token" else 0.0))
    return forward_flops(spec, tokens, prompt) / (row_gpus(row) * cluster.gpu.bf16_tflops)


def forward_flops(spec: ModelSpec, tokens: float, length: float) -> float:
    """FLOPs of a forward pass: 2 per parameter and token, and causal attention."""
    active = spec.params
    if spec.experts:
        idle = (spec.experts - spec.experts_per_token) * (3 if spec.gated_mlp else 2) * spec.hidden * spec.ffn
        active -= spec.layers * idle
    return tokens * (2.0 * active + 2.0 * spec.layers * length * spec.heads * spec.head_dim)


def _training(row: Row) -> float:
    tokens = number(row, "gbs") * number(row, "seq_len")
    passes = 4.0 if row.get("recompute") == "full" else 3.0
    pp, vpp = whole(row, "pp", 1), whole(row, "vpp", 1)
    slots = number(row, "gbs") / (row_dp(row) * number(row, "mbs"))
    flops = passes * forward_flops(row_spec(row), tokens, number(row, "seq_len"))
    peak = row_cluster(row).gpu.bf16_tflops
    return flops / (row_gpus(row) * peak) * (1.0 + (pp - 1) / (vpp * slots))


def _iteration(row: Row) -> float:
    models = {role: load_model(name) for role, name in row["models"].items()}
    length = number(row, "prompt_tokens") + number(row, "response_tokens")
    tokens = number(row, "batch_size") * length
    passes = {"actor": 1.0 + 4.0, "critic": 1.0 + 4.0, "ref": 1.0, "reward": 1.0}
    flops = sum(passes[role] * forward_flops(model, tokens, length) for role, model in models.items())
    return flops / (row_gpus(row) * ppo_cluster(row).gpu.bf16_tflops)


def fitted(costs: NDArray[np.float64], measured: NDArray[np.float64]) -> NDArray[np.float64]:
    """Strawman predictions: the costs times the constant of least squares in logarithms."""
    scaled: NDArray[np.float64] = costs * np.exp(np.mean(np.log(measured / costs)))
    return scaled
