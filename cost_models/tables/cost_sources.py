"""Where the numbers of a plan come from: measured, interpolated between measurements, or analytic."""

from __future__ import annotations

from pathlib import Path

from cost_models.estimate import PlanCost
from cost_models.tables.interpolation import Source
from cost_models.tables.tables import CostTable, load_table
from cost_models.time.engines import TABLE_SUFFIX
from plans.graph import CallKind
from plans.library import load_model
from plans.model import ModelSpec
from plans.plan import ExecutionPlan

REACH = 2.0
"""Sizes beyond the measured ones by more than this factor count as analytic."""


def cost_sources(cost: PlanCost) -> dict[str, float]:
    """Shares of the calls' predicted seconds whose blocks have sizes that the engine's cost table holds (measured),
    spans (interpolated), or neither (analytic). All is analytic where no table was given."""
    plan = cost.program.plan
    seconds = dict.fromkeys(Source, 0.0)
    table = load_table(Path(cost.engine)) if cost.engine.endswith(TABLE_SUFFIX) else None
    for planned in plan.calls:
        source = Source.ANALYTIC if table is None else _source(plan, planned.call, table)
        seconds[source] += sum(cost.terms[planned.call].values())
    total = sum(seconds.values()) or 1.0
    return {source.name.lower(): round(value / total, 3) for source, value in seconds.items()}


def _block(spec: ModelSpec) -> tuple[int, ...]:
    return spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.ffn


def _source(plan: ExecutionPlan, call: str, table: CostTable) -> Source:
    workload, strategy = plan.workload, plan.planned(call).strategy
    spec, points = workload.spec(call), {"tp": float(strategy.tp)}
    share = workload.samples_per_step(call) / strategy.dp
    if workload.graph.call(call).kind is CallKind.GENERATE:
        operation = "block_decode"
        points |= {
            "sequences": share / (strategy.groups * strategy.waves),
            "cached_tokens": workload.prompt_tokens + max(1.0, workload.response_tokens / 2),
        }
    else:
        operation = "block_forward"
        points |= {"sequences": share / strategy.micro_batches, "sequence_tokens": float(workload.tokens)}
    if not table.model or _block(load_model(table.model)) != _block(spec):
        return Source.ANALYTIC
    answer = table.answer(operation, points, 0.0)
    return Source.ANALYTIC if float(answer.beyond) > REACH else Source(int(answer.source))
