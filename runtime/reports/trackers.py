"""Metrics to the trackers that people watch runs with. A tracker that fails is left out; the run goes on."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from plans.errors import RealplanError
from plans.plan import ExecutionPlan
from plans.runfile import RunFile

EVENTS = "tensorboard"


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of an iteration."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in `tensorboard` of the output."""

    def __init__(self, plan: ExecutionPlan, run: RunFile) -> None:
        from tensorboard.summary import Writer

        self._writer: Any = Writer(str(Path(run.output) / EVENTS))

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; WANDB_MODE, WANDB_PROJECT and its other variables hold."""

    def __init__(self, plan: ExecutionPlan, run: RunFile) -> None:
        import wandb

        output = Path(run.output)
        self._run: Any = wandb.init(name=output.name, dir=str(output), config=settings(plan, run))

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=iteration)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow; MLFLOW_TRACKING_URI and its other variables hold."""

    def __init__(self, plan: ExecutionPlan, run: RunFile) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        self._id = mlflow.start_run(run_name=Path(run.output).name).info.run_id
        mlflow.log_dict(settings(plan, run), "run.json")

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(metrics), step=iteration, run_id=self._id)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS: Mapping[str, Callable[[ExecutionPlan, RunFile], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def settings(plan: ExecutionPlan, run: RunFile) -> dict[str, Any]:
    """What a tracker keeps beside the metrics: the run file, and the layout of every call."""
    calls = {p.call: f"{p.mesh.text(plan.cluster)}, {p.strategy.degrees}" for p in plan.calls}
    return {"algorithm": plan.workload.graph.name, "calls": calls, **run.model_dump(mode="json")}


def check_trackers(run: RunFile) -> None:
    """Raise RealplanError for a tracker that is not installed."""
    for name in run.trackers:
        if importlib.util.find_spec(name) is None:
            raise RealplanError(f"trackers names {name}, which is not installed", f"pip install {name}")


class Trackers:
    """The trackers of a run."""

    def __init__(self, plan: ExecutionPlan, run: RunFile) -> None:
        self._open: dict[str, Tracker] = {}
        for name in run.trackers:
            self._keep(name, lambda name=name: self._open.update({name: TRACKERS[name](plan, run)}))  # type: ignore[misc]

    def log(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Give every tracker the finite numbers of an iteration, or of an evaluation."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        found = {name: value for name, value in numbers.items() if name != "iteration" and math.isfinite(value)}
        for name, tracker in list(self._open.items()):
            self._keep(name, lambda tracker=tracker: tracker.log(iteration, found))  # type: ignore[misc]

    def close(self) -> None:
        """Close them all."""
        for name, tracker in list(self._open.items()):
            self._keep(name, tracker.close)

    def _keep(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # a network that fails, a quota, a bug: nothing that a run should end for
            self._open.pop(name, None)
            print(f"{name} is left out from here on: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
