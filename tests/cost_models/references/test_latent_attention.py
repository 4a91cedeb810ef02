"""By hand: DeepSeek's blocks (arXiv:2412.19437) as costs and memory see them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cost_models.candidates import Candidates
from cost_models.engines.engine import MEGATRON
from cost_models.memory.memory import call_memory
from cost_models.time.operations import layer_gemms
from plans.algorithms import algorithm_graph
from plans.cluster import ClusterSpec
from plans.errors import SpecError
from plans.library import load_cluster, load_model
from plans.strategy import ParallelStrategy
from plans.workload import Workload

V3 = load_model("deepseek-v3")
ONE = np.ones(1)


def test_products_use_every_active_weight_once() -> None:
    """37 billion of 671 are active per token (abstract): 8 of 256 experts and the shared one, in 58 of 61 layers, with
    the embedding and the head."""
    tokens = np.full(1, 2.0**20)
    products = sum(float((g.m * g.n * g.k * g.count)[0]) for g in layer_gemms(V3, tokens, ONE, ONE))
    weights = V3.layers * products / tokens[0]
    idle = 58 * (256 - 8) * 3 * 7168 * 2048
    small = V3.layers * (2 * 7168 + 1536 + 512) + 58 * 256 * 7168  # norms and routers
    assert weights == pytest.approx(V3.blocks_params - idle - small)
    assert (weights + 2 * V3.vocab * V3.hidden) / 1e9 == pytest.approx(37.5, rel=0.01)


def test_tensor_parallelism_cuts_heads_and_not_the_way_down() -> None:
    whole, cut = (layer_gemms(V3, 64.0 * ONE, tp * ONE, ONE) for tp in (1, 8))
    down, up = slice(0, 2), slice(2, 4)
    assert [float(g.n) for g in whole[down]] == [1536, 512 + 64] == [float(g.n) for g in cut[down]]
    assert [float(g.n[0]) for g in whole[up]] == [128 * 192, 128 * (128 + 128)]
    assert [float(g.n[0]) for g in cut[up]] == [16 * 192, 16 * (128 + 128)]


def test_layers_of_both_kinds_count_by_their_share() -> None:
    maverick = load_model("llama4-maverick")
    tokens = 4096.0 * ONE
    products = {float(np.max(g.n)): float(np.max(g.count)) for g in layer_gemms(maverick, tokens, ONE, ONE)}
    assert products[2 * 16384] == 0.5, "every other layer is one MLP"
    assert maverick.expert_layers == 24 and V3.expert_layers == 58


def memory_of(call: str, cluster: ClusterSpec, strategy: ParallelStrategy) -> tuple[float, float]:
    """Weights and KV cache of a rank, GB."""
    graph = algorithm_graph("grpo")
    workload = Workload(
        graph=graph, models=dict.fromkeys(graph.roles, V3), batch_size=16, group_size=32, prompt_tokens=1024,
        response_tokens=7168, minibatches=4, dtype="bf16",
    )  # fmt: skip
    terms = call_memory(MEGATRON.on(cluster, "bf16"), workload, call, Candidates.of([(cluster.whole, strategy)]))
    return float(terms.weights[0]) / 1e9, float(terms.kv_cache[0]) / 1e9


def test_weights_and_cache_of_a_rank() -> None:
    """Without a pipeline 256 ranks at ep 256 hold an expert of each of 58 layers, and everything else; caches of 512
    sequences lie on 256 replicas or, cut by tp, whole on every rank of a replica."""
    cluster = load_cluster("h100-80gb-sxm", gpus=256)
    experts = 58 * 3 * 7168 * 2048
    rest = V3.params - 256 * experts
    weights, _ = memory_of("ref_infer", cluster, ParallelStrategy(dp=256, ep=256))
    assert weights == pytest.approx(2 * (experts + rest) / 1e9, rel=1e-3)
    _, alone = memory_of("actor_generate", cluster, ParallelStrategy(dp=256))
    _, cut = memory_of("actor_generate", cluster, ParallelStrategy(dp=32, tp=8))
    assert alone == pytest.approx(2 * 8192 * 70_272 / 1e9, rel=0.1), "in blocks of 256 tokens"
    assert cut > 7 * alone


def test_latent_attention_needs_a_rotary_part() -> None:
    with pytest.raises(SpecError, match="latent attention needs a rotary_dim"):
        replace(V3, rotary_dim=0)
    with pytest.raises(SpecError, match="layers without experts need a dense_ffn"):
        replace(V3, dense_ffn=0)
