"""Engines as values: who runs the calls and how fast.

An engine is a named set of constants (`NamedEngine`), the default one calibrated with a cost table
(`calibration.profiled.ProfiledEngine`), or one for training and scoring and another for generation (`ComposedEngine`).
Only the command layer turns words into engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from cost_models.engines.constants import DEFAULT_ENGINE, engine_names, engine_records, load_constants
from cost_models.engines.habits import MemoryHabits
from cost_models.engines.machine import Machine, machine_of
from plans.cluster import ClusterSpec
from plans.errors import SpecError, nearest
from plans.graph import CallKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What an engine can run beyond what all can. context_parallel: cp above 1."""

    context_parallel: bool = False


class Engine(Protocol):
    """Who runs the calls."""

    @property
    def name(self) -> str:
        """What users call it; plans carry it."""
        ...

    @property
    def abilities(self) -> Abilities:
        """What it can run."""
        ...

    def running(self, kind: CallKind) -> Engine:
        """The engine that runs calls of a kind: itself, or a part of a composed one."""
        ...

    def on(self, cluster: ClusterSpec, dtype: str) -> Machine:
        """The cluster as this engine uses it in a precision; of a composed one, as training and scoring use it, which
        also move the weights."""
        ...


@dataclass(frozen=True, slots=True)
class NamedEngine:
    """An engine of the library (`engines.json`), with its constants for each GPU kind and precision."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in engine_names():
            raise SpecError(f"unknown engine `{self.name}`", nearest(self.name, list(engine_names())))

    @property
    def abilities(self) -> Abilities:
        """What the library says that it can run."""
        return Abilities(**engine_records()[self.name].get("can", {}))

    def running(self, kind: CallKind) -> Engine:
        """Itself."""
        return self

    def on(self, cluster: ClusterSpec, dtype: str) -> Machine:
        """The cluster with the library's constants."""
        return _machine(self.name, cluster, dtype)


@dataclass(frozen=True, slots=True)
class ComposedEngine:
    """`first` trains and scores, `second` generates."""

    first: Engine
    second: Engine

    @property
    def name(self) -> str:
        """Both names, as `--engine` takes them."""
        return f"{self.first.name}+{self.second.name}"

    @property
    def abilities(self) -> Abilities:
        """Those of the first; generation is asked for its own by `running`."""
        return self.first.abilities

    def running(self, kind: CallKind) -> Engine:
        """The second for generation, the first for everything else."""
        return (self.second if kind is CallKind.GENERATE else self.first).running(kind)

    def on(self, cluster: ClusterSpec, dtype: str) -> Machine:
        """The first's machine."""
        return self.first.on(cluster, dtype)


def memory_habits(name: str) -> MemoryHabits:
    """The memory habits of a named engine."""
    return MemoryHabits(**engine_records()[NamedEngine(name).name].get("memory", {}))


@lru_cache(maxsize=64)
def _machine(name: str, cluster: ClusterSpec, dtype: str) -> Machine:
    return machine_of(cluster, load_constants(name, cluster.gpu.name, dtype), dtype, memory_habits(name))


MEGATRON = NamedEngine(DEFAULT_ENGINE)
"""The default: this project's own runtime."""
