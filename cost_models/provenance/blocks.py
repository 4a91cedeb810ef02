"""Sources of a call under a calibrated engine: whether the cost table holds the sizes of its blocks."""

from __future__ import annotations

from cost_models.engines.measured import REACH
from cost_models.tables.interpolation import Source
from cost_models.tables.tables import CostTable
from plans.graph import CallKind
from plans.kvcache import slots_per_replica
from plans.library import load_model
from plans.model import ModelSpec
from plans.plan import ExecutionPlan


def block_source(plan: ExecutionPlan, call: str, table: CostTable) -> Source:
    """Whether the blocks of a call have sizes that the table holds (measured), spans (interpolated), or neither
    (analytic)."""
    workload, strategy = plan.workload, plan.planned(call).strategy
    spec, points = workload.spec(call), {"tp": float(strategy.tp)}
    share = workload.samples_per_step(call) / strategy.dp
    if workload.graph.call(call).kind is CallKind.GENERATE:
        operation = "block_decode"
        points |= {
            "sequences": slots_per_replica(int(share), strategy.slots, strategy.waves) / strategy.groups,
            "cached_tokens": workload.prompt_tokens + max(1.0, workload.response_tokens / 2),
        }
    else:
        operation = "block_forward"
        points |= {"sequences": share / strategy.micro_batches, "sequence_tokens": float(workload.tokens)}
    if not table.model or _block(load_model(table.model)) != _block(spec):
        return Source.ANALYTIC
    answer = table.answer(operation, points, 0.0)
    return Source.ANALYTIC if float(answer.beyond) > REACH else Source(int(answer.source))


def _block(spec: ModelSpec) -> tuple[int, ...]:
    return spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.ffn
