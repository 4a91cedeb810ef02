"""The default engine goes by measured kernels: it meets the tables' points, falls back to formulas, and stays fast."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cost_models.candidates import Candidates
from cost_models.distinct import distinct, on_distinct
from cost_models.engines.analytic import AnalyticKernels
from cost_models.engines.constants import engine_names, load_constants
from cost_models.engines.engine import MEGATRON, NamedEngine
from cost_models.engines.machine import Machine, machine_of
from cost_models.engines.measured import MeasuredKernels
from cost_models.tables.kernels import kernel_table
from cost_models.tables.tables import CostTable
from cost_models.time import operations
from cost_models.time.generation import decode_attention
from plans.library import load_cluster, load_model
from plans.strategy import ParallelStrategy

GPUS = ("a100-40gb", "a100-80gb", "h100-80gb-sxm", "h200-141gb", "b200-180gb", "l40s")


def machine(gpu: str, **constants: object) -> Machine:
    alone = replace(load_constants("megatron", gpu), throttle=0.0)
    return machine_of(load_cluster(gpu, gpus=8), replace(alone, **constants))  # type: ignore[arg-type]


def table(gpu: str) -> CostTable:
    found = kernel_table(gpu)
    assert found is not None
    return found


def array(*values: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array(values, dtype=np.float64)


@pytest.mark.parametrize("gpu", GPUS)
def test_gemms_are_those_of_the_table(gpu: str) -> None:
    entry, at = table(gpu).entries["gemm_efficiency"], machine(gpu)
    for i, j, k in ((0, 5, 7), (9, 10, 3), (17, 12, 10)):
        m, n, width = (entry.axes[name][x] for name, x in zip("mnk", (i, j, k), strict=True))
        seconds = at.kernels.gemm(array(m), n, width)
        assert 2 * m * n * width / seconds / at.peak_flops == pytest.approx(entry.values[i, j, k])


def test_backward_looks_up_its_own_shapes() -> None:
    at = machine("h100-80gb-sxm")
    m, n, k = array(4096), 512.0, 8192.0
    dgrad, wgrad = at.kernels.gemm(m, k, n), at.kernels.gemm(array(k), n, 4096.0)
    assert at.kernels.gemm_and_backward(m, n, k)[1] == pytest.approx(dgrad + wgrad)
    assert at.kernels.gemm_and_backward(m, n, k)[1] != pytest.approx(2 * at.kernels.gemm(m, n, k), rel=0.02)


def test_a_stream_of_gemms_is_slower_than_one() -> None:
    alone, running = machine("b200-180gb"), machine("b200-180gb", throttle=0.5)
    m = array(1, 8192)
    lost = running.kernels.gemm(m, 8192.0, 8192.0) / alone.kernels.gemm(m, 8192.0, 8192.0)
    assert lost[0] == pytest.approx(1.0, abs=0.01)  # streams weights: no FLOPs to throttle
    assert 1.2 < lost[1] < 1.5


def test_collectives_inside_a_node_are_measured_and_across_nodes_not() -> None:
    at, formula = machine("h100-80gb-sxm"), machine("h100-80gb-sxm", measured_kernels=False)
    entry = table("h100-80gb-sxm").entries["all_gather_node"]
    message, size = array(2097152, 2097152, 2097152), array(8, 3, 16)
    seconds = at.kernels.all_gather(message, size, np.minimum(size, 8))
    assert seconds[0] == pytest.approx(entry.values[2, 6])
    assert seconds[1:] == pytest.approx(formula.kernels.all_gather(message, size, np.minimum(size, 8))[1:])
    l40s = machine("l40s")  # nobody measured its links for all hosts
    assert np.isfinite(l40s.kernels.all_reduce(message, size, size)).all()


def test_attention_is_measured_for_head_dimension_128_only() -> None:
    llama, small = load_model("llama-7b"), load_model("smollm2-135m")
    at, formula = machine("a100-80gb"), machine("a100-80gb", measured_kernels=False)
    one = Candidates.of([(at.cluster.whole, ParallelStrategy(tp=8))])
    for spec, measured in ((llama, True), (small, False)):
        arguments = (spec, one, array(16), array(2048))
        same = decode_attention(at, *arguments) == pytest.approx(decode_attention(formula, *arguments))
        assert same is not measured
    lanes, length = 8, 2048
    share = table("a100-80gb").answer("attention_prefill_efficiency", {"lanes": lanes, "sequence_tokens": length}, 0.0)
    seconds = operations.attention_core(at, llama, array(2 * length), array(length), array(8))
    assert 2 * 128 * length**2 * lanes / seconds / at.peak_flops == pytest.approx(float(share.value))


def test_only_the_default_engine_goes_by_measured_kernels() -> None:
    for gpu in GPUS:
        for name in engine_names():
            kernels = NamedEngine(name).on(load_cluster(gpu), "bf16").kernels
            assert isinstance(kernels, MeasuredKernels) == (name == "megatron"), (gpu, name)
    for gpu, dtype in (("h100-80gb-sxm", "fp32"), ("local-cpu", "bf16"), ("rtx-4090", "bf16")):
        assert isinstance(MEGATRON.on(load_cluster(gpu), dtype).kernels, AnalyticKernels)


def test_distinct_combinations_are_evaluated_once() -> None:
    random = np.random.default_rng(0)
    x, y = random.integers(0, 5, 1000).astype(float), random.integers(0, 3, 1000).astype(float)
    first, inverse = distinct(x, y)
    assert len(first) == 15
    assert (x[first][inverse] == x).all() and (y[first][inverse] == y).all()
    sizes = []

    def product(x: np.ndarray, y: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        sizes.append(len(x))
        return x * y

    assert (on_distinct(product, x, y) == x * y).all() and sizes == [15]
