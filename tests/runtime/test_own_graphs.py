"""Graphs of the user's own: the ones that ship train, on any layout, and what they lack is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from invariance import Outcome, compare_losses, execute
from plan_cases import tiny_run

import plans.library
from plans.algorithms import algorithm_graph
from plans.checks import check_plan
from plans.codec import dump_plan, read_plan
from plans.errors import RealplanError
from plans.graphfile import load_graph
from plans.library import load_cluster, load_model
from plans.plan import ExecutionPlan, PlannedCall
from plans.runnable import run_problems
from plans.strategy import ParallelStrategy, parse_degrees
from plans.workload import Workload, role_spec
from runtime.calls.train_call import checked_loss

GRAPHS = Path(plans.library.__file__).parent / "graphs"
TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"


def planned(name: str, gpus: int, degrees: str) -> ExecutionPlan:
    """Every call of a graph that ships on the whole node; generation has no context parallelism."""
    graph = load_graph(GRAPHS / f"{name}.yaml")
    calls = tuple(
        replace(call, loss=str(GRAPHS.parents[2] / call.loss)) if ".py" in call.loss else call for call in graph.calls
    )
    graph, spec = replace(graph, calls=calls), load_model(str(TINY))
    workload = Workload(
        graph=graph, models={role: role_spec(role, spec) for role in graph.roles}, batch_size=2, group_size=4,
        prompt_tokens=8, response_tokens=8, minibatches=2, dtype="fp32",
    )  # fmt: skip
    cluster = load_cluster("local-cpu", gpus=gpus, gpus_per_node=gpus)
    made = []
    for call in graph.model_calls:
        strategy = ParallelStrategy(**parse_degrees(degrees if call.name != "actor_generate" else f"d{gpus} t1 p1"))
        made.append(PlannedCall(call=call.name, mesh=cluster.whole, strategy=strategy))
    plan = ExecutionPlan(workload=workload, cluster=cluster, calls=tuple(made))
    assert check_plan(plan) == [] and run_problems(plan) == []
    again, problems = read_plan(dump_plan(plan))
    assert not problems and again == plan
    return plan


@pytest.mark.parametrize(("name", "metric"), [("two-rewards", "actor/pg_loss"), ("distillation", "actor/teacher_kl")])
def test_graphs_that_ship_train_on_any_layout(name: str, metric: str, tmp_path: Path) -> None:
    weights = {"actor": str(TINY), "ref": str(TINY), "reward": "random", "teacher": "random"}

    def outcome(gpus: int, degrees: str) -> Outcome:
        run = tiny_run(tmp_path, iterations=2, weights=weights)
        return execute(planned(name, gpus, degrees), run, tmp_path / str(gpus))

    wanted, found = outcome(1, "d1 t1 p1"), outcome(2, "d1 t1 p1 c2")
    assert found[1] == wanted[1] and len(found[1]) == 2 * 8
    assert wanted[0][0]["actor/grad_norm"] > 0 and abs(wanted[0][1][metric]) > 0
    compare_losses(found, wanted)


def test_what_a_graph_lacks_to_be_trained_is_named() -> None:
    plan = planned("two-rewards", 1, "d1 t1 p1")

    def said(**changes: Any) -> str:
        calls = tuple(replace(c, **changes) if c.name == "actor_train" else c for c in plan.workload.graph.calls)
        graph = replace(plan.workload.graph, calls=calls)
        return run_problems(replace(plan, workload=replace(plan.workload, graph=graph)))[0].message

    assert said(loss="") == "`actor_train` of the graph `two-rewards` names no loss; without one the plan can be" + (
        " searched and costed"
    )
    assert "has loss `dpo`" in said(loss="dpo")
    assert "writes loss, which a train_step call does not make" in said(outputs=("loss",))
    assert not algorithm_graph("ppo").calls[0].loss


def test_a_loss_that_fails_is_named() -> None:
    import torch

    def fails(output: Any, batch: Any, tokens: float) -> Any:
        raise KeyError("teacher_logprobs")

    def wide(output: Any, batch: Any, tokens: float) -> Any:
        return torch.ones(3), {}

    with pytest.raises(RealplanError, match=r"loss `a.py:f` raised KeyError: 'teacher_logprobs'"):
        checked_loss("a.py:f", fails, None, None, 1.0)  # type: ignore[arg-type]
    with pytest.raises(RealplanError, match=r"loss `a.py:f` gave a tensor of shape \(3,\)"):
        checked_loss("a.py:f", wide, None, None, 1.0)  # type: ignore[arg-type]
