"""Machine: a cluster's devices as an engine uses them: bytes and FLOPs per second, kernels, memory habits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cost_models.engines.analytic import AnalyticKernels
from cost_models.engines.constants import Constants
from cost_models.engines.habits import MemoryHabits, habits_on
from cost_models.engines.kernels import Kernels
from cost_models.engines.measured import MeasuredKernels
from cost_models.engines.rates import Rates
from cost_models.tables.kernels import kernel_table
from plans.cluster import GIB, ClusterSpec


@dataclass(frozen=True, eq=False)
class Machine(Rates):
    """What calls are costed on: rates, kernels, what the engine keeps in memory. call_factors: how many times
    longer than by these a call takes where that was measured."""

    kernels: Kernels
    habits: MemoryHabits
    call_factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def context_bytes(self) -> float:
        """Memory that CUDA and its libraries take on every GPU once per process; none on CPU devices."""
        return self.habits.context_gib * GIB


def machine_of(
    cluster: ClusterSpec, constants: Constants, dtype: str = "bf16", habits: MemoryHabits | None = None
) -> Machine:
    """The machine of an engine's constants and habits (default: `MemoryHabits()`) on a cluster in a precision."""
    kernels = _kernels(Rates(cluster, constants, dtype))
    return Machine(cluster, constants, dtype, kernels, habits_on(cluster, habits or MemoryHabits()))


def _kernels(rates: Rates) -> Kernels:
    """Measured ones where the engine goes by them and its GPU kind has a table, which is of two-byte precisions."""
    analytic = AnalyticKernels(rates)
    if not rates.constants.measured_kernels or rates.dtype == "fp32":
        return analytic
    table = kernel_table(rates.cluster.gpu.name)
    return analytic if table is None else MeasuredKernels(analytic, table)
