"""Calibration: an engine whose constants are those of the machine on which a cost table was measured.

The whole analytic model then speaks of that machine, also of shapes that nobody measured, and search, simulation and
bound share one source of numbers. Constants are found by least squares on log(predicted / measured) over all points
(soft L1, so that a disturbed point does not rule), every operation with the same say, with a weak pull of each
constant towards the engine's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from cost_models.candidates import Array
from cost_models.tables.table_predictions import PREDICTORS, predict_entry
from cost_models.tables.table_schema import TableError
from cost_models.tables.tables import CostTable, Entry, load_table
from cost_models.time import collectives
from cost_models.time.engines import DEFAULT_ENGINE, Engine, load_engine
from cost_models.time.machine import Machine
from plans.cluster import ClusterSpec
from plans.library import load_gpu, load_model
from plans.model import ModelSpec

PULL = 0.05
LEAST_BACKWARD = 0.5
CONTRADICTION = 30.0
"""Times that a measured point may be off the model that fits all of them; small ones are off several times."""
STARTS: Mapping[str, float] = {
    "gemm_efficiency": 0.5,
    "gemm_half_extent": 32.0,
    "backward_gemm_ratio": 2.0,
    "attention_efficiency": 0.3,
    "attention_backward_ratio": 2.5,
    "memory_efficiency": 0.7,
    "kv_efficiency": 0.5,
    "hidden_passes": 12.0,
    "loss_passes": 6.0,
    "loss_backward_ratio": 1.0,
    "softmax_passes": 6.0,
    "host_forward_layer_s": 2e-4,
    "host_backward_layer_s": 4e-4,
    "host_decode_layer_s": 2e-4,
    "layer_gap_s": 2e-5,
    "decode_layer_s": 2e-5,
    "decode_step_s": 5e-4,
    "decode_row_s": 1e-5,
    "sampling_bytes": 120.0,
    "micro_batch_s": 5e-4,
    "step_s": 1e-3,
    "optimizer_bytes": 30.0,
    "accumulate_bytes": 4.0,
}
"""Constants that a profile determines, and where the search for those begins that the engine sets to zero."""
HOST = ("host_forward_layer_s", "host_backward_layer_s", "host_decode_layer_s")
"""Launching is apart from computing only where there are two devices: on a CPU these stay as they are."""
_COLLECTIVES = {
    "all_reduce_node": collectives.all_reduce,
    "all_gather_node": collectives.all_gather,
    "reduce_scatter_node": collectives.reduce_scatter,
}


@dataclass(frozen=True)
class Calibration:
    """The engine, and per operation the mean of |predicted / measured - 1| that is left over the table's points."""

    engine: Engine
    errors: Mapping[str, float]


def calibrate(table: CostTable, engine: Engine) -> Calibration:
    """Fit the constants of `engine` to a table of `realplan profile`; what the table does not tell stays as it is.
    Kernel tables of the GPU kind are left out: this machine was measured itself."""
    cluster = _cluster(table)
    fitted = _fit_links(table, replace(engine, measured_kernels=False), cluster)
    entries = {name: table.entries[name] for name in PREDICTORS if name in table.entries}
    if table.model and entries:
        fitted = _fit_operations(table, fitted, cluster, load_model(table.model), entries)
    return Calibration(fitted, _errors(table, fitted, cluster))


def table_engine(path: str, gpu: str, dtype: str) -> Engine:
    """The default engine calibrated with the table at `path`, which must be of that GPU kind and precision."""
    file = Path(path)
    return _calibrated(file.resolve(), file.stat().st_mtime_ns if file.exists() else 0, path, gpu, dtype)


@lru_cache(maxsize=8)
def _calibrated(file: Path, _: int, path: str, gpu: str, dtype: str) -> Engine:
    table = load_table(file)
    for key, have, want in (("hardware", table.hardware, gpu), ("precision", table.precision, dtype)):
        if have != want:
            raise TableError(
                f"{path}: {key}: the table was measured on `{have}`, the plan needs `{want}`",
                "profile with the device and the --dtype of the plan",
            )
    _check_complete(table, path)
    _check_backward(table, path)
    found = calibrate(table, load_engine(DEFAULT_ENGINE, gpu, dtype))
    _check_followed(table, found.engine, path)
    return replace(found.engine, name=path)


def _check_complete(table: CostTable, path: str) -> None:
    """A table of one model with all its operations: what was not measured would be a guess."""
    if not table.model:
        raise TableError(f"{path}: model: empty, as in a table of kernels", "give a table of `realplan profile`")
    missing = [name for name in PREDICTORS if name not in table.entries]
    if missing:
        raise TableError(
            f"{path}: entries: {', '.join(missing)} missing: the profile was not finished",
            "run the same `realplan profile` again; it goes on where it stopped",
        )


def _check_backward(table: CostTable, path: str) -> None:
    """A backward pass has two products for every one of the forward pass."""
    forward, backward = table.entries["block_forward"], table.entries["block_backward"]
    if forward.values.shape != backward.values.shape:
        return
    ratio = backward.values / forward.values
    if ratio.min() < LEAST_BACKWARD:
        at = "".join(f"[{i}]" for i in np.unravel_index(int(ratio.argmin()), ratio.shape))
        raise TableError(
            f"{path}: entries.block_backward.values{at}: {ratio.min():.2g} of block_forward's; at least"
            f" {LEAST_BACKWARD} is possible",
            "measure it again: take both entries out and run `realplan profile`",
        )


def _check_followed(table: CostTable, engine: Engine, path: str) -> None:
    """No point so far from the fitted model that it contradicts the others."""
    for name, predicted in _predictions(table, engine, _cluster(table)).items():
        measured = table.entries[name].values
        ratio = np.exp(np.abs(np.log(predicted / measured)))
        if ratio.max() > CONTRADICTION:
            at = np.unravel_index(int(ratio.argmax()), ratio.shape)
            raise TableError(
                f"{path}: entries.{name}.values{''.join(f'[{i}]' for i in at)}: {measured[at]:.3g} s contradicts the"
                f" other entries, which make it {predicted[at]:.3g} s; at most {CONTRADICTION:.0f} times is allowed",
                "measure it again: take the entry out and run `realplan profile`",
            )


def _cluster(table: CostTable) -> ClusterSpec:
    return ClusterSpec(nodes=1, gpus_per_node=8, gpu=load_gpu(table.hardware), inter_node_gbps=1.0)


def _fit_operations(
    table: CostTable, engine: Engine, cluster: ClusterSpec, spec: ModelSpec, entries: Mapping[str, Entry]
) -> Engine:
    names = [name for name in STARTS if getattr(engine, name) > 0 or name not in HOST]
    start = np.log([getattr(engine, name) or STARTS[name] for name in names])

    weights = {name: _weights(entry.values) for name, entry in entries.items()}

    def residuals(x: Array) -> Array:
        machine = Machine(cluster, _with(engine, names, x), table.precision)
        parts = []
        for name, entry in entries.items():
            ratio = np.log(predict_entry(machine, spec, name, entry) / entry.values)
            parts.append((ratio * weights[name]).reshape(-1))
        return np.concatenate([*parts, PULL * (x - start)])

    found = least_squares(residuals, start, loss="soft_l1", f_scale=0.05, ftol=1e-4, max_nfev=40)
    return _with(engine, names, found.x)


def _weights(seconds: Array) -> Array:
    """Weights of an operation's points, of norm 1: long ones count for more, since calls consist of them."""
    weights: Array = (seconds / seconds.max()) ** 0.5
    return weights / np.linalg.norm(weights)


def _with(engine: Engine, names: list[str], logs: Array) -> Engine:
    constants: dict[str, Any] = dict(zip(names, np.exp(logs).tolist(), strict=True))
    return replace(engine, **constants)


def _fit_links(table: CostTable, engine: Engine, cluster: ClusterSpec) -> Engine:
    """Latency and bandwidth from all-reduces; the other operations' bandwidths from their largest message."""
    entry = table.entries.get("all_reduce_node")
    if entry is None:
        return engine
    names = ["link_latency_s", "link_hop_s", "link_efficiency", "link_half_bytes"]
    start = np.log([max(getattr(engine, name), 1e-9) for name in names])

    def residuals(x: Array) -> Array:
        seconds = _collective(Machine(cluster, _with(engine, names, x), table.precision), "all_reduce_node", entry)
        return np.concatenate([np.log(seconds / entry.values).reshape(-1), PULL * (x - start)])

    found = least_squares(residuals, start, loss="soft_l1", f_scale=0.1, x_scale="jac")
    engine = _with(engine, names, found.x)
    shares = {
        "all_gather_efficiency": "all_gather_node",
        "reduce_scatter_efficiency": "reduce_scatter_node",
        "send_efficiency": "send_recv_node",
    }
    found_shares: dict[str, Any] = {field: _share(table, engine, cluster, of) for field, of in shares.items()}
    return replace(engine, **found_shares)


def _share(table: CostTable, engine: Engine, cluster: ClusterSpec, operation: str) -> float:
    """Bandwidth over the all-reduce's, of the largest message (geometric mean over group sizes): gradients and weights
    are what is scattered and gathered."""
    entry = table.entries.get(operation)
    if entry is None:
        return 1.0
    equal = replace(engine, all_gather_efficiency=1.0, reduce_scatter_efficiency=1.0, send_efficiency=1.0)
    predicted = _collective(Machine(cluster, equal, table.precision), operation, entry)
    return float(np.exp(np.mean(np.log(predicted / entry.values)[:, -1])))


def _collective(machine: Machine, operation: str, entry: Entry) -> Array:
    ranks, message = np.meshgrid(entry.axes["ranks"], entry.axes["bytes"], indexing="ij")
    if operation == "send_recv_node":
        return collectives.point_to_point(machine, message, np.zeros_like(message, dtype=np.bool_))
    return _COLLECTIVES[operation](machine, message, ranks, ranks)


def _predictions(table: CostTable, engine: Engine, cluster: ClusterSpec) -> dict[str, Array]:
    """Seconds of every entry that the model speaks of, in the shape of its values."""
    machine, entries = Machine(cluster, engine, table.precision), table.entries
    known = [name for name in PREDICTORS if name in entries] if table.model else []
    found = {name: predict_entry(machine, load_model(table.model), name, entries[name]) for name in known}
    links = [name for name in (*_COLLECTIVES, "send_recv_node") if name in entries]
    return found | {name: _collective(machine, name, entries[name]) for name in links}


def _errors(table: CostTable, engine: Engine, cluster: ClusterSpec) -> dict[str, float]:
    return {
        name: float(np.mean(np.abs(seconds / table.entries[name].values - 1.0)))
        for name, seconds in _predictions(table, engine, cluster).items()
    }
