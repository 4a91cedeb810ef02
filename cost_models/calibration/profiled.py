"""The engine of a profiled machine: the default one with the constants that a cost table determines."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from cost_models.calibration.fit import calibrate, table_predictions
from cost_models.calibration.predictions import TABLE_PREDICTORS
from cost_models.engines.constants import Constants, load_constants
from cost_models.engines.engine import MEGATRON, Abilities, Engine, memory_habits
from cost_models.engines.machine import Machine, machine_of
from cost_models.tables.table_file import load_table, located_fault, table_source
from cost_models.tables.table_schema import TableError
from cost_models.tables.tables import CostTable
from plans.cluster import ClusterSpec
from plans.graph import CallKind
from plans.problems import Path_

LEAST_BACKWARD = 0.25
"""Of the forward pass. Products make it two; but tiny blocks wait for Python, of which the backward pass has less."""
LATER = {"block_inference"}
"""Operations that tables from before do not have: `block_forward` stands for them."""
CONTRADICTION = 30.0
"""Times that a measured point may be off the model that fits all of them; small ones are off several times."""


@dataclass(frozen=True, slots=True, eq=False)
class ProfiledEngine:
    """The default engine on the machine of a cost table. `name` is the table's path, which errors and plans carry."""

    name: str
    table: CostTable

    def __post_init__(self) -> None:
        _check_complete(self.table, self.name)
        _check_backward(self.table, self.name)

    @property
    def abilities(self) -> Abilities:
        """Those of the default engine, whose code was measured."""
        return MEGATRON.abilities

    def running(self, kind: CallKind) -> Engine:
        """Itself."""
        return self

    def on(self, cluster: ClusterSpec, dtype: str) -> Machine:
        """The cluster with the calibrated constants; its GPU kind and the precision must be those of the table."""
        for key, have, want in (
            ("hardware", self.table.hardware, cluster.gpu.name),
            ("precision", self.table.precision, dtype),
        ):
            if have != want:
                raise TableError(
                    f"{self.name}: {key}: the table was measured on `{have}`, the plan needs `{want}`",
                    "profile with the device and the --dtype of the plan",
                )
        return _machine(self, cluster)


def profiled_engine(path: Path) -> ProfiledEngine:
    """The engine of the cost table at a path. The same file is read and fitted once."""
    return _profiled(str(path), path.resolve(), path.stat().st_mtime_ns if os.path.exists(path) else 0)


@lru_cache(maxsize=8)
def _profiled(name: str, file: Path, _: int) -> ProfiledEngine:
    return ProfiledEngine(name, load_table(file))


@lru_cache(maxsize=64)
def _machine(engine: ProfiledEngine, cluster: ClusterSpec) -> Machine:
    return machine_of(cluster, _constants(engine), engine.table.precision, memory_habits(MEGATRON.name))


@lru_cache(maxsize=8)
def _constants(engine: ProfiledEngine) -> Constants:
    """The default engine's constants, calibrated with the table."""
    table = engine.table
    found = calibrate(table, load_constants(MEGATRON.name, table.hardware, table.precision))
    _check_followed(engine, found.constants)
    return found.constants


def _check_complete(table: CostTable, path: str) -> None:
    """A table of one model with all its operations: what was not measured would be a guess."""
    if not table.model:
        raise _fault(path, ("model",), "empty, as in a table of kernels", "give a table of `realplan profile`")
    missing = [name for name in TABLE_PREDICTORS if name not in table.entries and name not in LATER]
    if missing:
        raise _fault(
            path,
            ("entries",),
            f"{', '.join(missing)} missing: the profile was not finished",
            "run the same `realplan profile` again; it goes on where it stopped",
        )


def _check_backward(table: CostTable, path: str) -> None:
    """A backward pass has two products for every one of the forward pass."""
    forward, backward = table.entries["block_forward"], table.entries["block_backward"]
    if forward.values.shape != backward.values.shape:
        return
    ratio = backward.values / forward.values
    if ratio.min() < LEAST_BACKWARD:
        at = (int(i) for i in np.unravel_index(int(ratio.argmin()), ratio.shape))
        raise _fault(
            path,
            ("entries", "block_backward", "values", *at),
            f"{ratio.min():.2g} of block_forward's; at least {LEAST_BACKWARD} is possible",
            "measure it again: take both entries out and run `realplan profile`",
        )


def _check_followed(engine: ProfiledEngine, constants: Constants) -> None:
    """No point so far from the fitted model that it contradicts the others."""
    table, path = engine.table, engine.name
    for name, predicted in table_predictions(table, constants).items():
        measured = table.entries[name].values
        ratio = np.exp(np.abs(np.log(predicted / measured)))
        if ratio.max() > CONTRADICTION:
            at = np.unravel_index(int(ratio.argmax()), ratio.shape)
            raise _fault(
                path,
                ("entries", name, "values", *(int(i) for i in at)),
                f"{measured[at]:.3g} s contradicts the other entries, which make it {predicted[at]:.3g} s; at most"
                f" {CONTRADICTION:.0f} times is allowed",
                "measure it again: take the entry out and run `realplan profile`",
            )


def _fault(file: str, path: Path_, message: str, hint: str) -> TableError:
    """The error of a value of the table in a file, located where the file is still there."""
    text = table_source(Path(file)) if os.path.isfile(file) else ""
    return located_fault(path, message, hint, file, text)
