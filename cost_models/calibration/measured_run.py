"""The engine of a run: another engine, with every call as much slower or faster as the run has measured."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

from cost_models.engines.engine import Abilities, Engine
from cost_models.engines.machine import Machine
from cost_models.estimate import cost_plan
from plans.cluster import ClusterSpec
from plans.codec import load_plan
from plans.errors import SpecError
from plans.graph import CallKind
from plans.lengthsfile import lengths_file, metrics_rows
from plans.plan import ExecutionPlan
from plans.run_output import METRICS, PLAN

RUN_MARK = "@"
"""Between an engine and the output of the run that calibrates it, in the engine's name: `megatron@runs/latest`."""


@dataclass(frozen=True)
class MeasuredRun:
    """What a run has measured. plan: the plan that it ran, on samples of the lengths that it saw and with the measured
    cost of its functions; seconds: of calls, the median over its iterations without the first, which warms up;
    iteration_s: likewise, 0 where it has done none."""

    folder: Path
    plan: ExecutionPlan
    seconds: Mapping[str, float]
    iteration_s: float


def measured_run(folder: Path) -> MeasuredRun:
    """Read the output of a run. Raises SpecError where it is none, or where its lines are no metrics."""
    if not os.path.isfile(folder / PLAN):
        raise SpecError(
            f"`{folder}` is no output of a run: it has no `{PLAN}`", "the folder that `output` of a run names"
        )
    plan = load_plan(folder / PLAN)
    rows = metrics_rows(folder / METRICS) if os.path.isfile(folder / METRICS) else []
    if not rows:
        return MeasuredRun(folder, plan, {}, 0.0)
    work = plan.workload
    longest, most = work.prompt_tokens, work.response_tokens
    work = work.with_lengths(lengths_file(folder / METRICS, prompt_tokens=longest, response_tokens=most))
    steady = rows[1:] or rows
    found = {call.name: _median(steady, f"plan/{call.name}/measured_s") for call in work.graph.calls}
    seconds = {name: value for name, value in found.items() if value > 0}
    plan = _with_functions(replace(plan, workload=work, estimate=None), seconds)
    return MeasuredRun(folder, plan, seconds, _median(steady, "timing_s/step"))


def _median(rows: list[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if isinstance(row.get(key), int | float) and row[key] >= 0]
    return float(median(values)) if values else 0.0


def _with_functions(plan: ExecutionPlan, seconds: Mapping[str, float]) -> ExecutionPlan:
    """The plan with the seconds per sample of its functions that follow from what they took."""
    graph, steps = plan.workload.graph, cost_plan(plan).durations.seconds
    calls = []
    for call in graph.calls:
        if not call.model and call.name in seconds and steps.get(call.name, 0.0) > 0:
            each = call.seconds_per_sample * seconds[call.name] / steps[call.name]
            call = replace(call, seconds_per_sample=float(f"{each:.4g}"))
        calls.append(call)
    return replace(plan, workload=replace(plan.workload, graph=replace(graph, calls=tuple(calls))))


@dataclass(frozen=True, slots=True)
class RunEngine:
    """`inner`, whose calls take `factors` (call, factor) times as long. `name` says both: `megatron@runs/latest`."""

    name: str
    inner: Engine
    factors: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        assert all(factor > 0 for _, factor in self.factors), self.factors

    @property
    def abilities(self) -> Abilities:
        """Those of the engine that ran."""
        return self.inner.abilities

    def running(self, kind: CallKind) -> Engine:
        """The engine that runs calls of a kind, with the same factors."""
        part = self.inner.running(kind)
        return self if part is self.inner else RunEngine(self.name, part, self.factors)

    def on(self, cluster: ClusterSpec, dtype: str) -> Machine:
        """The inner engine's machine with the factors."""
        return _machine(self, cluster, dtype)


@lru_cache(maxsize=64)
def _machine(engine: RunEngine, cluster: ClusterSpec, dtype: str) -> Machine:
    return replace(engine.inner.on(cluster, dtype), call_factors=dict(engine.factors))


def run_engine(run: MeasuredRun, inner: Engine) -> RunEngine:
    """The engine whose costs of the run's plan are what the run took. Calls that were not measured keep their cost."""
    predicted = cost_plan(run.plan, inner).durations.seconds
    models = {call.name for call in run.plan.workload.graph.model_calls}
    factors = tuple(
        (name, seconds / predicted[name])
        for name, seconds in sorted(run.seconds.items())
        if name in models and predicted.get(name, 0.0) > 0
    )
    return RunEngine(f"{inner.name}{RUN_MARK}{run.folder}", inner, factors)
