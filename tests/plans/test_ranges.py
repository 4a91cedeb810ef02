"""What files may say and what they mean where they are silent: ranges and defaults, listed key by key.

Files that people have written depend on them, so that none moves unseen.
"""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from plans import hyperparameters, planfile, runfile
from plans.algorithms import algorithm_graph
from plans.config_keys import Rope
from plans.decoder import Decoder
from plans.families import Mixtral, Qwen2Moe, Qwen3Moe
from plans.graphfile import graph_of
from plans.library import load_model
from plans.workload import Workload

ANY, REAL, NONE = float("inf"), 1e30, object()
BILLION, MILLION, SIZE = 10**9, 10**6, 10**8
COUNT = (1, BILLION)
FRACTION = 1e-6
"""How far beyond a bound of a key that takes fractions is tried, as a part of it."""

RUN: dict[type[BaseModel], dict[str, tuple[float, float, Any]]] = {
    runfile.RunWorkload: {
        "batch_size": (*COUNT, 512), "group_size": (*COUNT, 1), "prompt_tokens": (*COUNT, 1024),
        "response_tokens": (*COUNT, 1024), "mean_prompt_tokens": (0, BILLION, 0),
        "mean_response_tokens": (0, BILLION, 0), "minibatches": (*COUNT, 4),
    },
    runfile.Data: {"max_prompts": (0, BILLION, 0)},
    runfile.RunSampling: {"top_k": (0, BILLION, 0), "top_p": (FRACTION, 1.0, 1.0), "min_p": (0.0, 1.0, 0.0)},
    hyperparameters.Optimizer: {
        "lr": (0.0, REAL, 1e-6), "warmup_steps": (0, BILLION, 0), "weight_decay": (0.0, REAL, 0.0),
        "beta1": (0.0, 1 - FRACTION, 0.9), "beta2": (0.0, 1 - FRACTION, 0.95), "eps": (FRACTION, 1.0, 1e-8),
        "clip": (FRACTION, REAL, 1.0),
    },
    hyperparameters.Ppo: {
        "clip": (FRACTION, REAL, 0.2), "value_clip": (FRACTION, REAL, 0.2), "kl_coefficient": (0.0, REAL, 0.05),
        "gamma": (FRACTION, 1.0, 1.0), "gae_lambda": (0.0, 1.0, 0.95), "critic_warmup_iterations": (0, BILLION, 0),
    },
    runfile.RewardLimits: {"memory_gib": (0.1, 2.0**20, 8.0), "workers": (1, 256, 1)},
    hyperparameters.Dpo: {"beta": (FRACTION, REAL, 0.1)},
    runfile.Checkpoints: {"every": (0, BILLION, 10), "keep": (*COUNT, 2)},
    runfile.RunFile: {
        "iterations": (*COUNT, 10), "seed": (0, 2**63 - 1, 0), "timeout_s": (0.0, 1e7, 0.0),
        "restarts": (0, MILLION, 0),
    },
}  # fmt: skip
PLAN: dict[type[BaseModel], dict[str, tuple[float, float, Any]]] = {
    planfile.ModelFile: {
        "layers": (1, 10**4, NONE), "hidden": (1, SIZE, NONE), "heads": (1, SIZE, NONE), "kv_heads": (1, SIZE, NONE),
        "head_dim": (1, SIZE, NONE), "ffn": (1, SIZE, NONE), "vocab": (1, SIZE, NONE), "max_context": (1, SIZE, 4096),
        "window": (0, SIZE, 0), "rotary_dim": (0, SIZE, 0), "experts": (0, 10**5, 0),
        "experts_per_token": (0, 10**5, 0), "shared_ffn": (0, SIZE, 0),
    },
    planfile.GraphCallFile: {"seconds_per_sample": (0.0, 1e6, 0.0)},
    planfile.WorkloadFile: {
        "staleness": (0, 64, 0), "batch_size": (1, MILLION, NONE), "group_size": (1, MILLION, 1),
        "prompt_tokens": (1, 10**7, NONE), "response_tokens": (0, 10**7, NONE), "mean_prompt_tokens": (0, 10**7, 0),
        "mean_response_tokens": (0, 10**7, 0), "minibatches": (1, MILLION, NONE),
    },
    planfile.GpuFile: dict.fromkeys(
        ("memory_gib", "bf16_tflops", "fp32_tflops", "hbm_gbps", "link_gbps", "pcie_gbps"), (FRACTION, 1e6, NONE)
    ),
    planfile.ClusterFile: {
        "nodes": (1, 65_536, NONE), "gpus_per_node": (1, 65_536, NONE), "inter_node_gbps": (FRACTION, 1e6, NONE),
        "host_memory_gib": (FRACTION, 1e6, 1024.0),
    },
    planfile.CallFile: {
        "micro_batches": (1, MILLION, 1), "micro_batch_tokens": (1, SIZE, 0), "groups": (1, MILLION, 1),
        "slots": (1, MILLION, 0), "waves": (1, MILLION, 1), "lag": (0, 65, 0),
    },
    planfile.EstimateFile: dict.fromkeys(("iteration_s", "latency_s", "peak_gib", "host_gib"), (0.0, ANY, NONE)),
}  # fmt: skip
CONFIG: dict[type[BaseModel], dict[str, tuple[float, float, Any]]] = {
    Decoder: {
        "num_hidden_layers": (1, 10**4, NONE), "rms_norm_eps": (FRACTION, 1.0, 1e-6),
        "rope_theta": (FRACTION, 1e12, 10_000.0),
    } | dict.fromkeys(
        ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "max_position_embeddings"),
        (1, SIZE, NONE),
    ),
    Mixtral: {"num_local_experts": (1, 10**5, 8), "num_experts_per_tok": (1, 10**5, 2)},
    Qwen2Moe: {"shared_expert_intermediate_size": (0, SIZE, 5632), "num_experts_per_tok": (1, 10**5, NONE)},
    Qwen3Moe: {"moe_intermediate_size": (1, SIZE, NONE), "num_experts_per_tok": (1, 10**5, NONE)},
}  # fmt: skip
KEYS = [
    (model, name, *range_)
    for table in (RUN, PLAN, CONFIG)
    for model, keys in table.items()
    for name, range_ in keys.items()
]


@pytest.mark.parametrize(("model", "name", "low", "high", "default"), KEYS)
def test_a_key_takes_its_range_and_no_more(
    model: type[BaseModel], name: str, low: float, high: float, default: object
) -> None:
    field = model.model_fields[name]
    bounded = Annotated.__class_getitem__((field.annotation, *field.metadata))  # type: ignore[attr-defined]
    adapter: TypeAdapter[Any] = TypeAdapter(bounded)
    step = 1 if isinstance(low, int) else FRACTION
    for value in (low, high):
        assert value == ANY or adapter.validate_python(value) == value
    for value in (low - step, high + step * max(1, abs(high) * (step < 1))):
        if value != ANY:
            with pytest.raises(ValidationError):
                adapter.validate_python(value)
    assert field.is_required() if default is NONE else field.get_default() == default


def test_defaults_of_a_workload_and_of_a_graph() -> None:
    """Those of the README: 512 prompts of 1,024 + 1,024 tokens in four minibatches, every iteration on new weights."""
    graph = algorithm_graph("ppo")
    assert graph.staleness == 0 and algorithm_graph("grpo").staleness == 0
    workload = Workload(graph=graph, models=dict.fromkeys(graph.roles, load_model("llama-7b")))
    sizes = (workload.batch_size, workload.prompt_tokens, workload.response_tokens, workload.minibatches)
    assert sizes == (512, 1024, 1024, 4) and (workload.group_size, workload.dtype) == (1, "bf16")
    call = {"name": "g", "kind": "generate", "model": "actor", "inputs": ["prompts"], "outputs": ["sequences"]}
    assert graph_of(planfile.GraphFile.model_validate({"name": "mine", "calls": [call]})).staleness == 0


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "beta_fast", "mscale", "attention_factor"])
def test_factors_of_rotary_positions_are_positive_and_finite(name: str) -> None:
    for value in (1e-9, 1e12):
        assert getattr(Rope.model_validate({name: value}), name) == value
    for value in (0.0, -0.5, 1.1e12, float("inf"), float("nan")):
        with pytest.raises(ValidationError):
            Rope.model_validate({name: value})
    for count, legal in ((0, False), (1, True), (4096, True), (4097, False)):
        pairs = {"rope_type": "longrope", "short_factor": [1.0] * count, "long_factor": [1.0]}
        if legal:
            Rope.model_validate(pairs)
        else:
            with pytest.raises(ValidationError):
                Rope.model_validate(pairs)


def test_long_rope_is_louder_only_where_the_context_grows() -> None:
    """sqrt(1 + ln s / ln n) for s times a first context of n (Ding et al. 2024, section 3.3); 1 where it does not."""
    rope = Rope.model_validate({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]})
    for positions, loud in ((4096, 1.0), (2048, 1.0), (4096 * 32, 1.19024)):
        scaling = rope.scaling(positions, 4096)
        assert scaling is not None and scaling.attention_factor == pytest.approx(loud, rel=1e-5)  # type: ignore[union-attr]
