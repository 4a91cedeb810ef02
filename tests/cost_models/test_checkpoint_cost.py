"""What a checkpoint is predicted to cost: bytes by hand and by the runtime's own arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
from plan_cases import tiny_plan, tiny_run

from cost_models.checkpoint import checkpoint_cost
from cost_models.engines.engine import MEGATRON
from planner.baselines import symmetric
from planner.request import build_request
from plans.checkpoint import written
from plans.errors import Infeasible
from plans.plan import ExecutionPlan
from runtime.checkpoints.room import checkpoint_bytes


def test_llama_7b_by_hand() -> None:
    request = build_request(models={"actor": "llama-7b"}, sizes={"algorithm": "grpo"}, gpus=8)
    cost = symmetric(request.workload, request.cluster, MEGATRON)
    assert not isinstance(cost, Infeasible)
    plan = cost.program.plan
    found, machine = checkpoint_cost(plan, MEGATRON), MEGATRON.on(plan.cluster, "bf16")
    # 6.74e9 parameters (Touvron et al. 2023) of 12 bytes, an eighth on each GPU, over PCIe.
    assert found.bytes == pytest.approx(6.738e9 * 12, rel=1e-3)
    assert found.rank_bytes == pytest.approx(6.738e9 * 12 / 8, rel=0.05)
    assert found.copy_s == pytest.approx(found.rank_bytes / machine.host_bytes_per_s)
    assert found.copy_s == pytest.approx(6.738e9 * 12 / 8 / 64e9, rel=0.5)  # 64 GB/s by the data sheet


@pytest.mark.parametrize("degrees", ["d4 t1 p1", "d1 t2 p2", "d2 t2 p1"])
def test_bytes_are_those_that_ranks_write(degrees: str, tmp_path: Path) -> None:
    plan = tiny_plan(4, degrees)
    found = checkpoint_cost(plan, MEGATRON)
    assert found.bytes == checkpoint_bytes(plan, tiny_run(tmp_path)) == sum(_written(plan).values())
    assert found.rank_bytes == pytest.approx(max(_written(plan).values()), rel=1e-3)


def _written(plan: ExecutionPlan) -> dict[int, float]:
    """Bytes of every rank: 12 for each element that it writes."""
    layouts = [plan.layout(call) for call in ("actor_train", "critic_train")]
    return {rank: 12.0 * sum(e.size for layout in layouts for e in written(layout, rank)) for rank in range(4)}
