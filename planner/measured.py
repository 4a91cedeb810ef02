"""A search that goes on from a run: its workload with the lengths that it saw, and the costs that it measured."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cost_models.calibration.measured_run import MeasuredRun, RunEngine, measured_run, run_engine
from cost_models.engines.engine import Engine
from cost_models.estimate import cost_plan
from planner.request import Request, check_range
from plans.cluster import MOST_GPUS, ClusterSpec
from plans.errors import RealplanError, SpecError
from plans.plan import ExecutionPlan
from plans.run_output import RUN


@dataclass(frozen=True)
class Ran:
    """A run, and the engine that it calibrates."""

    run: MeasuredRun
    engine: RunEngine

    @property
    def plan(self) -> ExecutionPlan:
        """The run's plan, on samples of the measured lengths."""
        return self.run.plan

    @property
    def priced_s(self) -> float:
        """Seconds of an iteration of the run's plan by the costs that it measured."""
        return cost_plan(self.plan, self.engine).iteration_s

    def request(self, gpus: int | None, gpus_per_node: int | None) -> Request:
        """What is to be planned: the run's work, on its cluster or on another number of its GPUs."""
        run = self.run.folder / RUN
        cluster = resized(self.plan.cluster, gpus, gpus_per_node)
        return Request(workload=self.plan.workload, cluster=cluster, run=run if os.path.isfile(run) else None)


def ran(folder: Path, inner: Engine) -> Ran:
    """The run in a folder. `inner`: the engine that its measurements calibrate. Raises SpecError."""
    found = measured_run(folder)
    return Ran(found, run_engine(found, inner))


def resized(cluster: ClusterSpec, gpus: int | None, gpus_per_node: int | None) -> ClusterSpec:
    """The same kind of cluster with another number of GPUs."""
    check_range("--gpus", gpus, 1, MOST_GPUS, 8)
    check_range("--gpus-per-node", gpus_per_node, 1, MOST_GPUS, 8)
    total = gpus or cluster.size
    per_node = min(gpus_per_node or cluster.gpus_per_node, total)
    if total % per_node:
        below = total // per_node * per_node
        raise SpecError(f"{total} GPUs do not fill nodes of {per_node}", f"{below} or {below + per_node} GPUs")
    return replace(cluster, nodes=total // per_node, gpus_per_node=per_node)


def check_alone(folder: Path, others: Mapping[str, object]) -> None:
    """Raise where options that say what is to be planned stand beside --measured, which says it."""
    for option, value in others.items():
        if value:
            raise RealplanError(
                f"--measured {folder} and {option}: the run says what is planned", "leave one of the two out"
            )
