"""A small PPO plan that the tests of plans/ edit."""

from __future__ import annotations

import pytest

from plans.algorithms import ppo
from plans.cluster import DeviceMesh
from plans.library import load_cluster, load_model
from plans.plan import ExecutionPlan, PlannedCall
from plans.strategy import ParallelStrategy, Recompute
from plans.workload import Workload


@pytest.fixture
def plan() -> ExecutionPlan:
    """Four 70B models on 16 nodes: generation on all, scoring side by side, training on halves."""
    cluster = load_cluster("h100-80gb-sxm", gpus=128)
    model = load_model("llama-70b")
    value = model.with_value_head()
    workload = Workload(
        graph=ppo(), models={"actor": model, "ref": model, "critic": value, "reward": value}, minibatches=4
    )
    whole, left, right = cluster.whole, _nodes(0, 8), _nodes(8, 8)
    train = ParallelStrategy(dp=2, tp=8, pp=4, micro_batches=16, sequence_parallel=True, recompute=Recompute.SELECTIVE)
    return ExecutionPlan(
        workload=workload,
        cluster=cluster,
        calls=(
            PlannedCall(call="actor_generate", mesh=whole, strategy=ParallelStrategy(dp=16, tp=8)),
            PlannedCall(call="reward_infer", mesh=left, strategy=ParallelStrategy(dp=8, tp=8, micro_batches=16)),
            PlannedCall(call="ref_infer", mesh=right, strategy=ParallelStrategy(dp=8, tp=8, micro_batches=16)),
            PlannedCall(call="critic_infer", mesh=right, strategy=ParallelStrategy(dp=8, tp=8, micro_batches=16)),
            PlannedCall(call="actor_train", mesh=left, strategy=train),
            PlannedCall(call="critic_train", mesh=right, strategy=train),
        ),
    )


def _nodes(first: int, count: int) -> DeviceMesh:
    return DeviceMesh(first_node=first, nodes=count, first_gpu=0, gpus=8)
