"""Estimates say where their seconds come from, how far they may be off, and what binds."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from cost_models.engines.engine import MEGATRON, NamedEngine
from cost_models.estimate import PlanCost, cost_plan
from cost_models.provenance.sources import call_sources, plan_sources
from cost_models.tables.interpolation import Source
from cost_models.validation.error_band import ANY_ENGINE, KINDS, error_band, residuals, residuals_of
from planner.cli.commands.estimate import estimate_command
from planner.explanation.binding import binding_terms
from planner.explanation.critical import critical_path
from planner.explanation.report import render_cost
from plans.algorithms import algorithm_graph
from plans.cluster import DeviceMesh
from plans.codec import save_plan
from plans.library import load_cluster, load_model
from plans.plan import ExecutionPlan, PlannedCall
from plans.render import rank_ranges
from plans.strategy import ParallelStrategy, Recompute
from plans.workload import Workload


def ppo_plan(gpu: str = "h100-80gb-sxm", tp: int = 4, batch: int = 64) -> ExecutionPlan:
    graph, spec = algorithm_graph("ppo"), load_model("llama-7b")
    heads = {role: spec if role in ("actor", "ref") else spec.with_value_head() for role in graph.roles}
    workload = Workload(graph=graph, models=heads, batch_size=batch, prompt_tokens=512, response_tokens=512)
    cluster = load_cluster(gpu, gpus=8)
    strategy = ParallelStrategy(tp=tp, dp=8 // tp, micro_batches=4, sequence_parallel=True, recompute=Recompute.FULL)
    inference = replace(strategy, recompute=Recompute.NONE)
    generation = replace(inference, micro_batches=1, sequence_parallel=False)
    strategies = {"actor_generate": generation, "actor_train": strategy, "critic_train": strategy}
    mesh = DeviceMesh(first_node=0, nodes=1, first_gpu=0, gpus=8)
    calls = [
        PlannedCall(call=call.name, mesh=mesh, strategy=strategies.get(call.name, inference))
        for call in graph.model_calls
    ]
    return ExecutionPlan(workload=workload, cluster=cluster, calls=tuple(calls))


@cache
def cost_of(engine: str = "megatron", gpu: str = "h100-80gb-sxm", batch: int = 64) -> PlanCost:
    return cost_plan(ppo_plan(gpu, batch=batch), NamedEngine(engine))


def test_sources_add_up_to_the_seconds_of_the_calls() -> None:
    cost = cost_of()
    for call, terms in cost.terms.items():
        assert sum(call_sources(cost, call).seconds.values()) == pytest.approx(sum(terms.values()))
    found = plan_sources(cost)
    assert sum(found.shares.values()) == pytest.approx(1.0, abs=2e-3)
    assert found.shares["interpolated"] + found.shares["measured"] > 0.3
    assert found.shares["analytic"] > 0.1  # launches, streaming kernels and losses have no table


def test_kernels_on_the_grid_are_measured() -> None:
    """16,384 tokens against 4,096 x 3,072 are on the grid, 11,008 / 4 wide ones are not."""
    seconds = call_sources(cost_of(), "actor_train").seconds
    assert seconds[Source.MEASURED] > 0 and seconds[Source.INTERPOLATED] > 0


@pytest.mark.parametrize(
    ("engine", "gpu"), [("megatron-te", "h100-80gb-sxm"), ("megatron", "rtx-4090"), ("megatron", "h100-80gb-pcie")]
)
def test_nothing_is_measured_without_a_table(engine: str, gpu: str) -> None:
    assert plan_sources(cost_of(engine, gpu=gpu)).shares == {"measured": 0.0, "interpolated": 0.0, "analytic": 1.0}


def test_sizes_beyond_the_tables_are_said() -> None:
    inside, near, far = (plan_sources(cost_of(batch=batch)) for batch in (64, 96, 256))
    assert inside.beyond == 1.0
    assert near.beyond == pytest.approx(96 * 32 / 8 / 256)  # sequences x key-value heads on a rank; 256 were measured
    assert far.beyond == pytest.approx(4.0)


def test_residuals_bracket_and_the_pool_is_wider_than_its_parts() -> None:
    for entry in residuals():
        assert 0.5 < entry.low <= entry.middle <= entry.high < 2.0 and entry.rows >= 6
    for kind in set(KINDS.values()):
        assert residuals_of("nobody", kind).engine == ANY_ENGINE
    pool, own = residuals_of("megatron", "train"), residuals_of("megatron-te", "train")
    assert own.engine == "megatron-te" and pool.engine == ANY_ENGINE
    assert pool.high - pool.low > own.high - own.low and pool.rows > own.rows


def test_bands_contain_the_estimate_and_say_whose_they_are() -> None:
    for engine in ("megatron", "fsdp", "real"):
        cost = cost_of(engine)
        band = error_band(cost)
        assert band.low_s < cost.iteration_s < band.high_s
    assert "this one having none" in error_band(cost_of("megatron")).origin
    assert error_band(cost_of("real")).origin == "residuals of 16 published rows of engine real"
    assert set(error_band(cost_of("fsdp")).engines) == {"fsdp", ANY_ENGINE}  # it publishes no generation


def test_groups_of_ranks_cover_the_gpus_and_their_terms_add_up() -> None:
    memory = cost_of().memory
    assert sorted(rank for group in memory.groups for rank in group.ranks) == list(range(8))
    for group in memory.groups:
        assert sum(group.terms.values()) == pytest.approx(group.peak_bytes)
    assert max(group.peak_bytes for group in memory.groups) == memory.peak_bytes


def test_the_report_fits_100_columns_and_names_every_part() -> None:
    cost = cost_of()
    binding = binding_terms(cost, critical_path(cost.program, cost.durations))
    text = render_cost(cost, plan_sources(cost), error_band(cost), binding)
    assert max(len(line) for line in text.splitlines()) <= 100
    for words in ("80 % band", "residuals of", "interpolated", "decode_attention", "bounding terms", "ranks 0-7"):
        assert words in text
    assert rank_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_json_carries_sources_band_and_binding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    save_plan(ppo_plan(tp=8), path)
    assert estimate_command(path, engine=MEGATRON, changes=[], as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["costs"].values()) == pytest.approx(1.0, abs=2e-3)
    assert found["band"]["low_s"] < found["iteration_s"] < found["band"]["high_s"]
    assert found["binding"][0]["seconds"] > 0
