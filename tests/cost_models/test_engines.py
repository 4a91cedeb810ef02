"""Engines as values: composed ones run each kind of call by its part, words make them, and constants have origins."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
from plan_cases import FIXTURES

from cost_models.engines.constants import engine_names, engine_records, load_constants
from cost_models.engines.engine import MEGATRON, ComposedEngine, NamedEngine
from cost_models.estimate import cost_plan
from planner.cli.engine_words import engine_of
from planner.request import build_request
from planner.space.limits import Limits
from planner.space.pricing import Space, build_space
from plans.cluster import parse_mesh
from plans.errors import RealplanError, SpecError
from plans.graph import CallKind
from plans.plan import ExecutionPlan, PlannedCall
from plans.strategy import ParallelStrategy

GRAPHS = NamedEngine("cuda-graphs")
BOTH = ComposedEngine(MEGATRON, GRAPHS)
TABLE = FIXTURES / "costs" / "llama2-7b-h100.json"


def ppo_plan() -> ExecutionPlan:
    request = build_request(
        models={"actor": "llama-7b"}, sizes={}, cluster="h100-80gb-sxm", gpus=8, gpus_per_node=8, run=None
    )
    mesh = parse_mesh("node 0", request.cluster)
    strategy = ParallelStrategy(dp=2, tp=4, micro_batches=8)
    calls = tuple(PlannedCall(call=c.name, mesh=mesh, strategy=strategy) for c in request.workload.graph.model_calls)
    return ExecutionPlan(workload=request.workload, cluster=request.cluster, calls=calls)


def test_a_composed_engine_generates_by_the_second_and_does_all_else_by_the_first() -> None:
    plan = ppo_plan()
    both, first, second = (cost_plan(plan, engine).terms for engine in (BOTH, MEGATRON, GRAPHS))
    for call in plan.workload.graph.model_calls:
        assert both[call.name] == (second if call.kind is CallKind.GENERATE else first)[call.name], call.name
    assert first["actor_generate"] != second["actor_generate"]
    assert cost_plan(plan, BOTH).estimate.engine == "megatron+cuda-graphs"


def test_a_search_prices_calls_by_their_part_of_the_engine() -> None:
    request = build_request(
        models={"actor": "llama-7b"}, sizes={}, cluster="h100-80gb-sxm", gpus=8, gpus_per_node=8, run=None
    )
    fastest = {}
    for engine in (BOTH, MEGATRON, GRAPHS):
        space = build_space(request.workload, request.cluster, engine, Limits())
        assert isinstance(space, Space)
        columns = zip(space.problem.names, space.problem.options, strict=True)
        fastest[engine.name] = {name: options.time_s.min() for name, options in columns}
    for call in request.workload.graph.model_calls:
        part = GRAPHS if call.kind is CallKind.GENERATE else MEGATRON
        assert fastest[BOTH.name][call.name] == fastest[part.name][call.name], call.name


def test_words_make_engines() -> None:
    assert engine_of("fsdp") == NamedEngine("fsdp")
    assert engine_of("megatron+cuda-graphs") == BOTH
    profiled = engine_of("megatron+cuda-graphs", TABLE)
    assert isinstance(profiled, ComposedEngine) and profiled.second == GRAPHS
    assert profiled.first is engine_of(str(TABLE)), "the same file is read and fitted once"
    assert profiled.name == f"{TABLE}+cuda-graphs" and engine_of(profiled.name).name == profiled.name


@pytest.mark.parametrize(
    ("words", "table", "says"),
    [
        ("megatorn", None, "unknown engine `megatorn`"),
        ("megatron+vllm", None, "unknown engine `vllm`"),
        ("megatron+eager+native", None, "3 engines; there can be two"),
        ("megatron+", None, "unknown engine ``"),
        ("fsdp", TABLE, "calibrates the engine `megatron`"),
        ("megatron", Path("none.json"), "no such file"),
    ],
)
def test_words_that_are_no_engine_are_refused(words: str, table: Path | None, says: str) -> None:
    with pytest.raises((RealplanError, SpecError), match=says):
        engine_of(words, table)


def test_every_engine_says_what_it_is_and_every_constant_where_it_comes_from() -> None:
    library = json.loads((files("cost_models") / "library" / "engines.json").read_text())
    for name, record in engine_records().items():
        assert record["about"], name
    for entry in library["entries"]:
        assert entry["engine"] == "*" or entry["engine"] in engine_names()
        origin = entry["origin"]
        for constant in entry["constants"]:
            said = origin.get(constant) if isinstance(origin, dict) else origin
            assert said and said != "analytic" and len(said) > 15, (entry["engine"], entry["gpu"], constant)


def test_sister_precisions_share_constants() -> None:
    assert load_constants("fsdp", "h100-80gb-sxm", "fp16") == load_constants("fsdp", "h100-80gb-sxm", "bf16")
