"""ExecutionPlan: for every model call its mesh, strategy and place in the order. The file format is codec's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from plans.cluster import ClusterSpec, DeviceMesh
from plans.errors import PlanError, nearest
from plans.layout import Layout
from plans.strategy import ParallelStrategy
from plans.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCall:
    """Where and how one call runs. `lag` 1 runs it one period later (2: two) than the rest of its iteration."""

    call: str
    mesh: DeviceMesh
    strategy: ParallelStrategy
    lag: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Predicted figures of a plan. `of` is the digest of the plan they were computed from.

    iteration_s: steady-state period. latency_s: one iteration alone. calls_s: seconds per call. peak_gib: largest
    memory on a GPU, at `peak_at` (call and mesh). host_gib: largest host memory of a node.
    """

    iteration_s: float
    latency_s: float
    calls_s: Mapping[str, float]
    peak_gib: float
    peak_at: str
    host_gib: float
    engine: str
    of: str


@dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """A workload on a cluster with one planned call per model call; the order of `calls` is the order in which
    calls that share GPUs run."""

    workload: Workload
    cluster: ClusterSpec
    calls: tuple[PlannedCall, ...]
    estimate: Estimate | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""
    notes: str = ""

    def planned(self, call: str) -> PlannedCall:
        """The planned call of that name."""
        for planned in self.calls:
            if planned.call == call:
                return planned
        raise PlanError(f"the plan has no call `{call}`", nearest(call, [c.call for c in self.calls]))

    def layout(self, call: str) -> Layout:
        """The layout of a call's model."""
        planned = self.planned(call)
        return Layout.of(self.workload.spec(call), planned.mesh, planned.strategy, self.cluster)

    def ranks(self, call: str) -> range:
        """Global ranks of a call's mesh."""
        return self.planned(call).mesh.ranks(self.cluster)

    @property
    def limits(self) -> list[str]:
        """The user's limits on the search that found it, as options of its command line; none where it says none."""
        record = self.provenance.get("search")
        found = record.get("limits") if isinstance(record, Mapping) else None
        return [str(words) for words in found] if isinstance(found, list) else []

    def with_estimate(self, estimate: Estimate | None) -> ExecutionPlan:
        """The same plan with another estimate."""
        return replace(self, estimate=estimate)
