"""Where the seconds of a plan come from: measured, interpolated between measurements, or analytic; and how far beyond
the measured sizes they reach.

A machine with measured kernels is asked which answers it gave (`RecordingKernels`): a term's seconds come from a source
to the extent that they follow when all answers of that source are stretched a little. An engine of a cost table is
judged by the sizes of its blocks (`blocks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from cost_models.calibration.profiled import ProfiledEngine
from cost_models.candidates import Candidates
from cost_models.engines.machine import Machine
from cost_models.engines.measured import MeasuredKernels, RecordingKernels
from cost_models.estimate import PlanCost
from cost_models.provenance.blocks import block_source
from cost_models.tables.interpolation import Source
from cost_models.time.calls import call_time
from plans.plan import ExecutionPlan

STRETCH = 1e-6
"""Small enough that no maximum changes hands, large enough for the digits of a float."""


@dataclass(frozen=True)
class Sources:
    """Seconds by source, and the largest ratio of a size to the nearest measured one (1: none is beyond)."""

    seconds: Mapping[Source, float] = field(default_factory=dict)
    beyond: float = 1.0

    @property
    def shares(self) -> dict[str, float]:
        """Share by source, as a plan's provenance states it."""
        total = sum(self.seconds.values()) or 1.0
        return {source.name.lower(): round(self.seconds.get(source, 0.0) / total, 3) for source in Source}


def plan_sources(cost: PlanCost) -> Sources:
    """Sources of the seconds of all calls of a plan."""
    return together(call_sources(cost, call) for call in cost.terms)


def together(parts: Iterable[Sources]) -> Sources:
    """The sum of several."""
    seconds, beyond = dict.fromkeys(Source, 0.0), 1.0
    for part in parts:
        beyond = max(beyond, part.beyond)
        for source, value in part.seconds.items():
            seconds[source] += value
    return Sources(seconds, beyond)


def call_sources(cost: PlanCost, call: str) -> Sources:
    """Sources of the seconds of one call."""
    plan, total = cost.program.plan, sum(cost.terms[call].values())
    engine = cost.engine.running(plan.workload.graph.call(call).kind)
    if isinstance(engine, ProfiledEngine):
        return Sources({block_source(plan, call, engine.table): total})
    machine = engine.on(plan.cluster, plan.workload.dtype)
    if isinstance(machine.kernels, MeasuredKernels):
        return _recorded(machine, machine.kernels, plan, call, total)
    return Sources({Source.ANALYTIC: total})


def _recorded(machine: Machine, kernels: MeasuredKernels, plan: ExecutionPlan, call: str, total: float) -> Sources:
    """Sources of a call's terms, by how they follow the measured and the interpolated answers; the rest is analytic."""
    plain, beyond = _terms(machine, kernels, plan, call, Source.MEASURED, 0.0)
    seconds: dict[Source, float] = {}
    for source in (Source.MEASURED, Source.INTERPOLATED):
        longer, _ = _terms(machine, kernels, plan, call, source, STRETCH)
        follows = sum(max(longer[name] - plain[name], 0.0) for name in plain) / STRETCH
        seconds[source] = min(follows, total - sum(seconds.values()))
    seconds[Source.ANALYTIC] = total - sum(seconds.values())
    return Sources(seconds, beyond)


def _terms(
    machine: Machine, kernels: MeasuredKernels, plan: ExecutionPlan, call: str, stretched: Source, stretch: float
) -> tuple[dict[str, float], float]:
    """Seconds by term with the answers of one source stretched, and how far the answers reach."""
    recording = RecordingKernels(kernels.analytic, kernels.table, stretched=stretched, stretch=stretch)
    planned = plan.planned(call)
    one = Candidates.of([(planned.mesh, planned.strategy)])
    found = call_time(replace(machine, kernels=recording), plan.workload, call, one)
    return {name: float(seconds[0]) for name, seconds in found.items()}, max(recording.beyond, default=1.0)
