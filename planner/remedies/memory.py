"""What the commands say of a plan that needs more memory than there is: where, how much, and what would need less."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from cost_models.estimate import PlanCost
from planner.text import PROSE_WIDTH
from plans.checks import check_plan
from plans.cluster import GIB
from plans.graph import CallKind
from plans.kvcache import slots_per_replica
from plans.plan import ExecutionPlan, PlannedCall
from plans.problems import Problem
from plans.strategy import ParallelStrategy, Recompute


def misfits(cost: PlanCost) -> list[str]:
    """Lines on what does not fit, each shortage with its hint; none where everything fits."""
    plan, memory = cost.program.plan, cost.memory
    lines = []
    if _gpu_short(cost):
        needs = f"{memory.peak_gib:.1f} of {plan.cluster.gpu.memory_gib:g} GiB on rank {memory.peak_rank}"
        lines += [f"does not fit: {memory.peak_step} needs {needs}", f"  hint: {memory_hint(plan, memory.peak_step)}"]
    if _host_short(cost):
        node = int(memory.host_bytes_by_node.argmax())
        needs = f"{_host_gib(cost):.1f} of {plan.cluster.host_memory_gib:g} GiB of host memory"
        lines += [f"does not fit: node {node} needs {needs}", "  hint: offload fewer models"]
    return [part for line in lines for part in textwrap.wrap(line, PROSE_WIDTH, subsequent_indent="  ")]


def memory_problems(cost: PlanCost) -> list[Problem]:
    """Out of memory on a GPU or a host: the call, the moment and the largest terms."""
    plan, memory = cost.program.plan, cost.memory
    problems = []
    if _gpu_short(cost):
        largest = ", ".join(f"{name} {size / GIB:.1f}" for name, size in list(memory.peak_terms.items())[:4])
        call = next((i for i, p in enumerate(plan.calls) if p.call == memory.peak_step), 0)
        message = (
            f"{memory.peak_step} needs {memory.peak_gib:.1f} GiB on rank {memory.peak_rank}, the GPU has "
            f"{plan.cluster.gpu.memory_gib:g} GiB (largest: {largest} GiB)"
        )
        problems.append(Problem("memory", message, memory_hint(plan, memory.peak_step), ("calls", call)))
    if _host_short(cost):
        message = f"offloaded weights and states need {_host_gib(cost):.0f} GiB of host memory on a node that has "
        message += f"{plan.cluster.host_memory_gib:g} GiB"
        problems.append(Problem("host-memory", message, "offload fewer models", ("calls",)))
    return problems


def _gpu_short(cost: PlanCost) -> bool:
    return cost.memory.peak_bytes > cost.program.plan.cluster.gpu_memory_bytes


def _host_short(cost: PlanCost) -> bool:
    return _host_gib(cost) > cost.program.plan.cluster.host_memory_gib


def _host_gib(cost: PlanCost) -> float:
    return float(cost.memory.host_bytes_by_node.max()) / GIB


def memory_hint(plan: ExecutionPlan, step: str) -> str:
    """What a call of the step could set to need less memory; only what keeps the plan legal."""
    planned = next((p for p in plan.calls if p.call == step), None)
    planned = planned or next((p for p in plan.calls if p.call in step), plan.calls[0])
    legal = [words for words, changed in _remedies(plan, planned) if _is_legal(plan, planned, changed)]
    if planned.mesh != plan.cluster.whole:
        legal.append("a larger mesh")
    if not legal:
        return f"more GPUs for `{planned.call}`, or a smaller batch"
    return f"try {', or '.join(legal)} for `{planned.call}`"


def _remedies(plan: ExecutionPlan, planned: PlannedCall) -> Iterator[tuple[str, ParallelStrategy]]:
    """Settings that save memory in a call of this kind, as the plan file writes them."""
    s, kind = planned.strategy, plan.workload.graph.call(planned.call).kind
    held = slots_per_replica(plan.workload.samples // s.dp, s.slots, s.waves)
    cuts = {"micro_batches": 2 * s.micro_batches}
    if s.micro_batch_tokens:
        cuts = {"micro_batch_tokens": s.micro_batch_tokens // 2}
    settings: dict[CallKind, dict[str, Any]] = {
        CallKind.GENERATE: {"slots": max(1, held // 2)},
        CallKind.INFERENCE: {**cuts, "offload": True},
        CallKind.TRAIN_STEP: {**cuts, "recompute": Recompute.FULL, "offload": True},
    }
    for key, value in settings[kind].items():
        shown = "true" if value is True else value if isinstance(value, int) else f'"{value}"'
        if getattr(s, key) != value:
            changed: ParallelStrategy = replace(s, **{key: value})
            yield f'"{key}": {shown}', replace(changed, waves=1) if key == "slots" else changed
    for key in ("tp", "pp") if kind is not CallKind.GENERATE else ("tp",):
        if s.dp % 2 == 0 and (s.dp * s.cp // 2) % s.ep == 0:
            deeper: ParallelStrategy = replace(s, **{"dp": s.dp // 2, key: 2 * getattr(s, key)})
            yield f'"strategy": "{deeper.degrees}"', deeper


def _is_legal(plan: ExecutionPlan, planned: PlannedCall, strategy: ParallelStrategy) -> bool:
    changed = replace(planned, strategy=strategy)
    return not check_plan(replace(plan, calls=tuple(changed if p is planned else p for p in plan.calls)))
