"""What the solvers reckon a plan to cost is what its simulation says, and no bound lies above it."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from cost_models.engines.engine import MEGATRON
from planner.best import Effort, Found, best_plan
from planner.request import Request, build_request
from planner.search import schedule
from planner.search.portfolio import Method
from planner.search.relaxation import relax
from planner.space.numbering import options_of, problem_of
from plans.cluster import DeviceMesh
from plans.strategy import ParallelStrategy

REQUESTS = 50
MODELS = ("llama-7b", "llama-13b", "qwen3-0.6b", "qwen3-8b", "qwen3-30b-a3b")
ALGORITHMS = ("ppo", "grpo", "rloo", "remax", "reinforce++", "dpo", "sft", "reward-modelling")


def drawn(seed: int) -> Request:
    """A random request that fits on its GPUs."""
    generator = random.Random(seed)
    algorithm = generator.choice(ALGORITHMS)
    model = generator.choice(MODELS)
    gpus = generator.choice((2, 4, 8, 16) if model in MODELS[2:3] else (16, 24))
    sizes: dict[str, int | str | bool | None] = {
        "algorithm": algorithm,
        "batch_size": generator.choice((32, 64, 128)),
        "prompt_tokens": generator.choice((128, 512)),
        "response_tokens": generator.choice((128, 1024)),
        "minibatches": generator.choice((1, 2, 4)),
        "recompute_logprobs": algorithm == "ppo" and generator.random() < 0.5,
    }
    return build_request(
        models={"actor": model},
        sizes=sizes,
        cluster=generator.choice(("h100-80gb-sxm", "a100-80gb")),
        gpus=gpus,
        gpus_per_node=min(gpus, 8),
    )


@pytest.mark.parametrize("seed", range(REQUESTS))
def test_search_and_simulation_agree(seed: int) -> None:
    """The solvers leave out the transfers of batches, which are below 0.1 % of a period, and nothing else."""
    request = drawn(seed)
    effort = Effort(method=Method.WALK, evaluations=2000, seed=seed)
    found = best_plan(request.workload, request.cluster, effort=effort)
    if not isinstance(found, Found):
        assert found.reason
        return
    own_s, simulated_s = schedule.cost(found.space.problem, found.decision).period_s, found.cost.iteration_s
    assert 0.999 * simulated_s <= own_s <= simulated_s * (1 + 1e-9)
    assert relax(found.space.problem).bound_s <= own_s


def test_calls_of_one_version_and_layout_share_a_copy() -> None:
    """ReMax generates twice from the same weights: one reallocation serves both calls."""
    request = build_request(
        models={"actor": "llama-7b"}, sizes={"algorithm": "remax", "batch_size": 64}, gpus=2, gpus_per_node=2
    )
    found = best_plan(request.workload, request.cluster, effort=Effort(method=Method.WALK, evaluations=4000))
    assert isinstance(found, Found)
    reallocations = [s for s in found.cost.program.steps if s.kind == "reallocate"]
    problem, decision = found.space.problem, found.decision
    choice = np.array(decision.choice)
    moving = [v for (u, v), moves in problem.moves.items() if moves.between(choice[[u]], choice[[v]])[0, 0] > 0]
    assert len(reallocations) < len(moving), "two calls, one copy"
    assert schedule.cost(problem, decision).period_s == pytest.approx(found.cost.iteration_s, rel=1e-4)


def test_an_own_split_of_the_layers_is_reallocated() -> None:
    """Same mesh and degrees, other layers on the stages: two copies, and the search counts the move between them."""
    request = build_request(models={"actor": "qwen3-0.6b"}, sizes={"algorithm": "grpo"}, gpus=2, gpus_per_node=2)
    workload, cluster = request.workload, request.cluster
    mesh, even = DeviceMesh(first_node=0, nodes=1, first_gpu=0, gpus=2), ParallelStrategy(pp=2)
    layouts = {call.name: [(mesh, even)] for call in workload.graph.model_calls}
    layouts["actor_train"] = [(mesh, replace(even, layers_per_stage=split)) for split in ((14, 14), (10, 18))]
    options = {
        name: options_of(found, cluster, np.ones((len(found), 4)) * [1.0, 0.0, 0.0, 0.0])
        for name, found in layouts.items()
    }
    problem = problem_of(workload, MEGATRON.on(cluster, workload.dtype), 1.0, layouts, options)
    train, generate = problem.names.index("actor_train"), problem.names.index("actor_generate")
    same, other = problem.moves[train, generate].between([0, 1], [0]).ravel().tolist()
    assert same == 0 < other
    ids = problem.options[train].layout.tolist()
    assert problem.options[generate].layout.tolist() == ids[:1] != ids[1:]
