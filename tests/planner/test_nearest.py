"""What is said where nothing fits: the fewest GPUs and the least memory with which there is a plan."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cost_models.engines.engine import MEGATRON
from planner.remedies.nearest import with_nearest
from planner.request import Request, build_request
from planner.search.portfolio import Solution, search
from planner.space.limits import Limits, parse_limits
from planner.space.pricing import Space, build_space
from plans.errors import Infeasible

ENGINE = MEGATRON


def request(model: str, gpus: int) -> Request:
    return build_request(
        models={"actor": model}, sizes={}, cluster="h100-80gb-sxm", gpus=gpus, gpus_per_node=None, run=None
    )


def planned(asked: Request, limits: Limits | None = None) -> Solution | Infeasible:
    space = build_space(asked.workload, asked.cluster, ENGINE, limits or Limits())
    return search(space.problem, seconds=10.0, gap=1.0) if isinstance(space, Space) else space


def hint(asked: Request, limits: Limits) -> str:
    failed = planned(asked, limits)
    assert isinstance(failed, Infeasible)
    return with_nearest(failed, asked.workload, asked.cluster, ENGINE, limits).hint


@pytest.mark.parametrize("model, gpus", [("llama-7b", 1), ("llama-70b", 16)])
def test_what_is_said_to_be_enough_is(model: str, gpus: int) -> None:
    """One call that is too large (7B on one GPU), and calls that are too large together (70B on 16)."""
    asked = request(model, gpus)
    said = re.match(r"needs (\d+) more GPUs?, or (\d+) GiB per GPU", hint(asked, Limits()))
    assert said
    assert isinstance(planned(request(model, gpus + int(said[1]))), Solution)
    larger = replace(asked.cluster, gpu=replace(asked.cluster.gpu, memory_gib=float(said[2])))
    assert isinstance(planned(replace(asked, cluster=larger)), Solution)
    smaller = replace(asked.cluster, gpu=replace(asked.cluster.gpu, memory_gib=0.9 * float(said[2])))
    assert isinstance(planned(replace(asked, cluster=smaller)), Infeasible)


def test_a_memory_bound_is_raised() -> None:
    limits = Limits(max_memory_gib=12.0)
    assert re.match(r"needs \d+ more GPUs, or (1[3-9]|2\d) GiB per GPU", hint(request("llama-7b", 8), limits))


def test_rules_that_contradict_keep_their_own_hint() -> None:
    asked = request("llama-7b", 8)
    calls = [call.name for call in asked.workload.graph.model_calls]
    limits = parse_limits(["actor_train.tp=2", "actor_train.tp=4"], [], [], "", calls)
    assert "--pin" in hint(asked, limits)


def test_calls_share_a_mesh_where_asked() -> None:
    asked = request("llama-7b", 16)
    calls = [call.name for call in asked.workload.graph.model_calls]
    limits = parse_limits([], [], ["actor_generate,ref_infer", "ref_infer,critic_train"], "", calls)
    space = build_space(asked.workload, asked.cluster, ENGINE, limits)
    assert isinstance(space, Space)
    found = search(space.problem, seconds=10.0, gap=1.0)
    assert isinstance(found, Solution)
    plan = space.plan(found.decision)
    assert len({plan.planned(name).mesh for name in ("actor_generate", "ref_infer", "critic_train")}) == 1
