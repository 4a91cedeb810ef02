"""Calibration finds the constants that made a table, and the commands use the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cost_models.calibration.fit import calibrate
from cost_models.calibration.predictions import TABLE_PREDICTORS, predict_entry
from cost_models.calibration.profiled import profiled_engine
from cost_models.engines.constants import Constants, load_constants
from cost_models.engines.machine import machine_of
from cost_models.estimate import cost_plan
from cost_models.provenance.sources import plan_sources
from cost_models.tables.table_file import save_table
from cost_models.tables.table_schema import OPERATIONS, TableError
from cost_models.tables.tables import CostTable, TableEntry
from plans.algorithms import algorithm_graph
from plans.library import load_cluster, load_model
from plans.plan import ExecutionPlan, PlannedCall
from plans.strategy import ParallelStrategy
from plans.workload import Workload

MODEL = "llama-7b"
GPU = "h100-80gb-sxm"
AXES = {
    "tp": (1, 2, 4),
    "sequences": (1, 4, 16),
    "sequence_tokens": (256, 1024, 4096),
    "cached_tokens": (256, 1024, 4096),
    "tokens": (256, 2048, 8192),
    "parameters": (1e7, 1e8, 1e9),
}


def truth() -> Constants:
    """A machine that nobody has: constants far from the library's."""
    return replace(
        load_constants("megatron", GPU),
        measured_kernels=False,
        gemm_efficiency=0.5,
        backward_gemm_ratio=2.3,
        attention_efficiency=0.25,
        attention_backward_ratio=3.5,
        memory_efficiency=0.6,
        kv_efficiency=0.3,
        loss_passes=20.0,
        decode_step_s=2e-3,
        decode_row_s=5e-5,
        optimizer_bytes=60.0,
        accumulate_bytes=12.0,
        link_efficiency=0.4,
        all_gather_efficiency=0.5,
        reduce_scatter_efficiency=0.25,
        send_efficiency=2.0,
    )


def table_of(constants: Constants, noise: float = 0.0) -> CostTable:
    """The table that a profile of that machine would write."""
    machine = machine_of(load_cluster(GPU), constants)
    random = np.random.default_rng(0)
    entries = {}
    for name in TABLE_PREDICTORS:
        axes = {axis: np.array(AXES[axis], dtype=np.float64) for axis in OPERATIONS[name].axes}
        blank = TableEntry(axes=axes, values=np.ones([len(points) for points in axes.values()]))
        values = predict_entry(machine, load_model(MODEL), name, blank)
        entries[name] = replace(blank, values=values * np.exp(noise * random.standard_normal(values.shape)))
    ranks, size = np.array([2.0, 4.0, 8.0]), np.array([2.0**16, 2.0**20, 2.0**24, 2.0**28])
    grid = np.meshgrid(ranks, size, indexing="ij")
    made = {
        "all_reduce_node": machine.kernels.all_reduce(grid[1], grid[0], grid[0]),
        "all_gather_node": machine.kernels.all_gather(grid[1], grid[0], grid[0]),
        "reduce_scatter_node": machine.kernels.reduce_scatter(grid[1], grid[0], grid[0]),
        "send_recv_node": machine.kernels.send(grid[1], np.zeros_like(grid[1], dtype=np.bool_)),
    }
    entries |= {name: TableEntry(axes={"ranks": ranks, "bytes": size}, values=values) for name, values in made.items()}
    return CostTable(
        hardware=GPU, device="none", model=MODEL, precision="bf16", date="2026-01-01", source="test", entries=entries
    )


def test_constants_of_a_synthetic_machine_are_found() -> None:
    wanted, start = truth(), load_constants("megatron", GPU)
    found = calibrate(table_of(wanted), start)
    assert max(found.errors.values()) < 0.05, found.errors
    for name in ("gemm_efficiency", "backward_gemm_ratio", "kv_efficiency"):
        assert getattr(found.constants, name) == pytest.approx(getattr(wanted, name), rel=0.15), name
    for name in ("optimizer_bytes", "loss_passes"):  # bytes over bandwidth: only the quotient shows
        per_byte = getattr(found.constants, name) / found.constants.memory_efficiency
        assert per_byte == pytest.approx(getattr(wanted, name) / wanted.memory_efficiency, rel=0.1), name
    for name in ("link_efficiency", "all_gather_efficiency", "reduce_scatter_efficiency", "send_efficiency"):
        assert getattr(found.constants, name) == pytest.approx(getattr(wanted, name), rel=0.1), name
    assert found.constants.network_efficiency == start.network_efficiency  # the table does not tell


def test_noise_moves_little() -> None:
    found = calibrate(table_of(truth(), noise=0.1), load_constants("megatron", GPU))
    clean = table_of(truth())
    machine = machine_of(load_cluster(GPU), found.constants)
    for name in ("block_forward", "block_backward", "head_forward"):
        ratio = predict_entry(machine, load_model(MODEL), name, clean.entries[name]) / clean.entries[name].values
        assert np.mean(np.abs(ratio - 1.0)) < 0.1, name


def test_a_table_names_an_engine(tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    save_table(table_of(truth()), path)
    engine, cluster = profiled_engine(path), load_cluster(GPU)
    constants = engine.on(cluster, "bf16").constants
    assert engine.name == str(path) and constants.backward_gemm_ratio == pytest.approx(2.3, rel=0.1)
    with pytest.raises(TableError, match="hardware: the table was measured on `h100-80gb-sxm`, the plan needs `cpu`"):
        engine.on(load_cluster("local-cpu"), "bf16")
    with pytest.raises(TableError, match="precision"):
        engine.on(cluster, "fp32")
    with pytest.raises(TableError, match="no such cost table"):
        profiled_engine(tmp_path / "none.json")


def test_a_plan_says_where_its_costs_come_from(tmp_path: Path) -> None:
    path, spec = tmp_path / "h100.json", load_model(MODEL)
    save_table(table_of(truth()), path)
    models = {"actor": spec, "ref": spec, "critic": spec.with_value_head(), "reward": spec.with_value_head()}
    sizes = {"batch_size": 16, "prompt_tokens": 512, "response_tokens": 512, "minibatches": 1}
    workload = Workload(graph=algorithm_graph("ppo"), models=models, **sizes)
    cluster = load_cluster(GPU)

    def shares(tp: int, dp: int) -> dict[str, float]:
        strategy = ParallelStrategy(tp=tp, dp=dp)
        calls = [PlannedCall(call=c.name, mesh=cluster.whole, strategy=strategy) for c in workload.graph.calls]
        plan = ExecutionPlan(workload=workload, cluster=cluster, calls=tuple(calls))
        return plan_sources(cost_plan(plan, profiled_engine(path))).shares

    measured = shares(2, 4)  # 4 sequences of 1,024 tokens are in the table; generation lies between its points
    assert sum(measured.values()) == pytest.approx(1.0, abs=2e-3)
    assert measured["measured"] > 0.1 and measured["interpolated"] > 0.1 and measured["analytic"] == 0
    assert shares(8, 1) == {"measured": 0.0, "interpolated": 0.0, "analytic": 1.0}


def _scaled(table: CostTable, name: str, factor: float) -> CostTable:
    entry = table.entries[name]
    return replace(table, entries={**table.entries, name: replace(entry, values=entry.values * factor)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: replace(t, model=""), "model: empty, as in a table of kernels"),
        (lambda t: replace(t, entries={}), "entries: block_forward, .* missing: the profile was not finished"),
        (
            lambda t: replace(t, entries={k: v for k, v in t.entries.items() if k != "optimizer_step"}),
            "entries: optimizer_step missing",
        ),
        (lambda t: _scaled(t, "head_forward", 1e4), "entries.head_forward.values.* contradicts the other entries"),
        (lambda t: _scaled(t, "block_backward", 1e-3), "entries.block_backward.values.* of block_forward's"),
    ],
)
def test_tables_that_would_make_costs_a_guess_are_refused(
    change: Callable[[CostTable], CostTable], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "h100.json"
    save_table(change(table_of(truth())), path)
    with pytest.raises(TableError, match=says):
        profiled_engine(path).on(load_cluster(GPU), "bf16")
