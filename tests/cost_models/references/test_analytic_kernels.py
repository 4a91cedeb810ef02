"""The product's own formulas of kernels by hand: FLOPs or bytes over rates of round numbers, latency by levels of a
tree (Sanders, Speck and Traff 2009), ring bytes as nccl-tests counts them (PERFORMANCE.md)."""

from __future__ import annotations

from dataclasses import replace
from math import hypot, sqrt
from typing import Any

import numpy as np
import pytest
from textbook import NOTHING

from cost_models.engines.analytic import AnalyticKernels
from cost_models.engines.rates import Rates
from plans.cluster import ClusterSpec, GpuSpec

GPU = GpuSpec(name="round", memory_gib=80, bf16_tflops=100, fp32_tflops=10, hbm_gbps=1000, link_gbps=100, pcie_gbps=1)
CLUSTER = ClusterSpec(nodes=8, gpus_per_node=8, gpu=GPU, inter_node_gbps=10)
LINK, NETWORK = 100e9, 10e9
MESSAGE = 1e9


def kernels(dtype: str = "bf16", **constants: Any) -> AnalyticKernels:
    return AnalyticKernels(Rates(CLUSTER, replace(NOTHING, **constants), dtype))


def array(value: float) -> Any:
    return np.array([float(value)])


def collective(name: str, size: int, per_node: int, message: float = MESSAGE, **constants: Any) -> float:
    return float(getattr(kernels(**constants), name)(array(message), array(size), array(per_node))[0])


FACTORS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "scattered_all_reduce": 2.0}


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_ring_inside_a_node(name: str, size: int) -> None:
    """(n - 1) / n of the message from every rank, twice in an all-reduce; n ranks keep 1 - 1 / n^2 of a link busy."""
    expected = FACTORS[name] * (size - 1) / size * MESSAGE / (LINK * (1 - 1 / size**2))
    assert collective(name, size, size) == pytest.approx(expected)
    assert collective(name, 1, 1) == 0


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize(("size", "per_node", "pace"), [(4, 1, NETWORK), (16, 4, 4 * NETWORK), (64, 8, 8 * NETWORK)])
def test_ring_over_nodes_has_the_network_of_its_ranks_on_a_node(
    name: str, size: int, per_node: int, pace: float
) -> None:
    expected = FACTORS[name] * (size - 1) / size * MESSAGE / pace
    assert collective(name, size, per_node) == pytest.approx(expected)


def test_links_bound_a_ring_whose_network_is_faster() -> None:
    expected = 2 * 15 / 16 * MESSAGE / (LINK * (1 - 1 / 64))
    assert collective("all_reduce", 16, 8, network_efficiency=2.0) == pytest.approx(expected)


def test_all_to_all_takes_the_longer_of_what_stays_and_what_leaves() -> None:
    """Of every rank's bytes (n - per_node) / n leave over its own share of the network."""
    assert collective("all_to_all", 8, 8) == pytest.approx(7 / 8 * MESSAGE / (LINK * (1 - 1 / 64)))
    assert collective("all_to_all", 16, 8) == pytest.approx(1 / 2 * MESSAGE / NETWORK)
    fast = collective("all_to_all", 16, 8, network_efficiency=100.0)
    assert fast == pytest.approx(15 / 16 * MESSAGE / (LINK * (1 - 1 / 256)))
    assert collective("all_to_all", 1, 1) == 0


def test_latency_is_a_launch_and_the_levels_of_a_tree() -> None:
    """log2(size) levels, of which log2(size / per_node) between nodes; one-way collectives take half of up and down."""
    constants = {"link_latency_s": 100.0, "link_hop_s": 10.0, "network_latency_s": 1.0}
    assert collective("all_reduce", 8, 8, 1.0, **constants) == pytest.approx(100 + 3 * 10)
    assert collective("all_reduce", 32, 8, 1.0, **constants) == pytest.approx(100 + 5 * 10 + 2 * 1)
    assert collective("all_gather", 32, 8, 1.0, **constants) == pytest.approx(100 + (5 * 10 + 2 * 1) / 2)
    assert collective("reduce_scatter", 8, 8, 1.0, **constants) == pytest.approx(100 + 3 * 10 / 2)


def test_mid_sizes_reach_less_of_the_bandwidth() -> None:
    """Twice the time at `half_bytes`, 1 + sqrt(half / bytes) elsewhere; links and network each have their own."""
    inside = collective("all_reduce", 4, 4)
    assert collective("all_reduce", 4, 4, link_half_bytes=MESSAGE) == pytest.approx(2 * inside)
    assert collective("all_reduce", 4, 4, link_half_bytes=4 * MESSAGE) == pytest.approx((1 + sqrt(4)) * inside)
    assert collective("all_reduce", 4, 4, network_half_bytes=MESSAGE) == pytest.approx(inside)
    across = collective("all_reduce", 4, 1)
    assert collective("all_reduce", 4, 1, network_half_bytes=4 * MESSAGE) == pytest.approx(3 * across)
    assert collective("all_reduce", 4, 1, link_half_bytes=MESSAGE) == pytest.approx(across)


def test_efficiencies_of_single_collectives() -> None:
    for name in ("all_gather", "reduce_scatter"):
        assert collective(name, 4, 4, **{f"{name}_efficiency": 0.5}) == pytest.approx(2 * collective(name, 4, 4))
    halves = collective("scattered_all_reduce", 4, 4, all_gather_efficiency=0.5, reduce_scatter_efficiency=0.25)
    assert halves == pytest.approx((4 + 2) / 2 * collective("all_reduce", 4, 4))


@pytest.mark.parametrize("across", [False, True])
def test_send(across: bool) -> None:
    at = kernels(link_latency_s=3.0, network_latency_s=5.0, send_efficiency=0.5, pipeline_efficiency=0.25)
    pace, latency = (0.25 * NETWORK, 3 + 5) if across else (0.5 * LINK, 3)
    assert at.send(array(MESSAGE), np.array([across])) == pytest.approx(latency + MESSAGE / pace)


def test_a_product_is_compute_or_bytes_whichever_is_longer() -> None:
    """2 m n k FLOPs against (m k + k n + m n) elements, joined as the sides of a right angle."""
    m, n, k = 64, 1024, 2048
    compute, passing = 2 * m * n * k / 100e12, (m * k + k * n + m * n) / 1000e9
    assert kernels().gemm(array(m), n, k) == pytest.approx(hypot(compute, 2 * passing))
    assert kernels("fp32").gemm(array(m), n, k) == pytest.approx(hypot(10 * compute, 4 * passing))
    half = kernels(gemm_efficiency=0.5, memory_efficiency=0.25).gemm(array(m), n, k)
    assert half == pytest.approx(hypot(2 * compute, 8 * passing))
    tiles = kernels(gemm_half_extent=64.0).gemm(array(m), n, k)
    assert tiles == pytest.approx(hypot(compute * 2 * (1 + 64 / n) * (1 + 64 / k), 2 * passing))
    forward, backward = kernels(backward_gemm_ratio=2.25).gemm_and_backward(array(m), n, k)
    assert forward == pytest.approx(hypot(compute, 2 * passing)) and backward == pytest.approx(2.25 * forward)


def test_attention_and_its_cache() -> None:
    causal = kernels(attention_efficiency=0.5).attention(128, array(4096), array(2048), array(12))
    assert causal == pytest.approx(0.5 * 4 * 4096 * 2048 * 12 * 128 / 50e12)
    read = kernels(kv_efficiency=0.5).cache_read(128, array(32), array(700), array(4))
    assert read == pytest.approx(32 * 700 * 4 * 2 * 128 * 2 / 500e9)
