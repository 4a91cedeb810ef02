"""Calibration: constants that are those of the machine on which a cost table was measured.

The whole analytic model then speaks of that machine, also of shapes that nobody measured, and search, simulation and
bound share one source of numbers. Constants are found by least squares on log(predicted / measured) over all points
(soft L1, so that a disturbed point does not rule), every operation with the same say, with a weak pull of each
constant towards the engine's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cost_models.calibration.predictions import TABLE_PREDICTORS, predict_entry
from cost_models.candidates import Array
from cost_models.engines.constants import Constants
from cost_models.engines.machine import Machine, machine_of
from cost_models.tables.tables import CostTable, TableEntry
from plans.cluster import ClusterSpec
from plans.library import load_gpu, load_model
from plans.model import ModelSpec

PULL = 0.05
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
    "inference_host_ratio": 1.0,
    "prefill_host_ratio": 1.0,
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
HOST_RATIOS: Mapping[str, str] = {"inference_host_ratio": "block_inference", "prefill_host_ratio": "block_prefill"}
"""Parts of the forward launch time, and the operations that tell them; older tables have no `block_inference`."""
_LINKS = ("all_reduce_node", "all_gather_node", "reduce_scatter_node", "send_recv_node")


@dataclass(frozen=True)
class Calibration:
    """The constants, and per operation the mean of |predicted / measured - 1| that is left over the table's points."""

    constants: Constants
    errors: Mapping[str, float]


def calibrate(table: CostTable, constants: Constants) -> Calibration:
    """Fit the constants of an engine to a table of `realplan profile`; what the table does not tell stays as it is.
    Kernel tables of the GPU kind are left out: this machine was measured itself."""
    cluster = _cluster(table)
    fitted = _fit_links(table, replace(constants, measured_kernels=False), cluster)
    entries = {name: table.entries[name] for name in TABLE_PREDICTORS if name in table.entries}
    if table.model and entries:
        fitted = _fit_operations(table, fitted, cluster, load_model(table.model), entries)
    return Calibration(fitted, _errors(table, fitted))


def _cluster(table: CostTable) -> ClusterSpec:
    return ClusterSpec(nodes=1, gpus_per_node=8, gpu=load_gpu(table.hardware), inter_node_gbps=1.0)


def _least_squares(residuals: Callable[[Array], Array], start: Array, **settings: Any) -> Array:
    """Least squares with soft L1 loss. The solver loads here: a search without a cost table does without it."""
    from scipy.optimize import least_squares

    return np.asarray(least_squares(residuals, start, loss="soft_l1", **settings).x)


def _fit_operations(
    table: CostTable, constants: Constants, cluster: ClusterSpec, spec: ModelSpec, entries: Mapping[str, TableEntry]
) -> Constants:
    fixed = {name for name in HOST if not getattr(constants, name)}
    fixed |= {name for name, of in HOST_RATIOS.items() if of not in entries or "host_forward_layer_s" in fixed}
    names = [name for name in STARTS if name not in fixed]
    start = np.log([getattr(constants, name) or STARTS[name] for name in names])

    weights = {name: _weights(entry.values) for name, entry in entries.items()}

    def residuals(x: Array) -> Array:
        machine = machine_of(cluster, _with(constants, names, x), table.precision)
        parts = []
        for name, entry in entries.items():
            ratio = np.log(predict_entry(machine, spec, name, entry) / entry.values)
            parts.append((ratio * weights[name]).reshape(-1))
        return np.concatenate([*parts, PULL * (x - start)])

    found = _least_squares(residuals, start, f_scale=0.05, ftol=1e-4, max_nfev=40)
    return _with(constants, names, found)


def _weights(seconds: Array) -> Array:
    """Weights of an operation's points, of norm 1: long ones count for more, since calls consist of them."""
    weights: Array = (seconds / seconds.max()) ** 0.5
    return weights / np.linalg.norm(weights)


def _with(constants: Constants, names: list[str], logs: Array) -> Constants:
    found: dict[str, Any] = dict(zip(names, np.exp(logs).tolist(), strict=True))
    return replace(constants, **found)


def _fit_links(table: CostTable, constants: Constants, cluster: ClusterSpec) -> Constants:
    """Latency and bandwidth from all-reduces; the other operations' bandwidths from their largest message."""
    entry = table.entries.get("all_reduce_node")
    if entry is None:
        return constants
    names = ["link_latency_s", "link_hop_s", "link_efficiency", "link_half_bytes"]
    start = np.log([max(getattr(constants, name), 1e-9) for name in names])

    def residuals(x: Array) -> Array:
        seconds = _collective(
            machine_of(cluster, _with(constants, names, x), table.precision), "all_reduce_node", entry
        )
        return np.concatenate([np.log(seconds / entry.values).reshape(-1), PULL * (x - start)])

    found = _least_squares(residuals, start, f_scale=0.1, x_scale="jac")
    constants = _with(constants, names, found)
    shares = {
        "all_gather_efficiency": "all_gather_node",
        "reduce_scatter_efficiency": "reduce_scatter_node",
        "send_efficiency": "send_recv_node",
    }
    found_shares: dict[str, Any] = {field: _share(table, constants, cluster, of) for field, of in shares.items()}
    return replace(constants, **found_shares)


def _share(table: CostTable, constants: Constants, cluster: ClusterSpec, operation: str) -> float:
    """Bandwidth over the all-reduce's, of the largest message (geometric mean over group sizes): gradients and weights
    are what is scattered and gathered."""
    entry = table.entries.get(operation)
    if entry is None:
        return 1.0
    equal = replace(constants, all_gather_efficiency=1.0, reduce_scatter_efficiency=1.0, send_efficiency=1.0)
    predicted = _collective(machine_of(cluster, equal, table.precision), operation, entry)
    return float(np.exp(np.mean(np.log(predicted / entry.values)[:, -1])))


def _collective(machine: Machine, operation: str, entry: TableEntry) -> Array:
    ranks, message = np.meshgrid(entry.axes["ranks"], entry.axes["bytes"], indexing="ij")
    kernels = machine.kernels
    if operation == "send_recv_node":
        return kernels.send(message, np.zeros_like(message, dtype=np.bool_))
    collectives = {
        "all_reduce_node": kernels.all_reduce,
        "all_gather_node": kernels.all_gather,
        "reduce_scatter_node": kernels.reduce_scatter,
    }
    return collectives[operation](message, ranks, ranks)


def table_predictions(table: CostTable, constants: Constants) -> dict[str, Array]:
    """Seconds of every entry that the model speaks of, in the shape of its values."""
    machine, entries = machine_of(_cluster(table), constants, table.precision), table.entries
    known = [name for name in TABLE_PREDICTORS if name in entries] if table.model else []
    found = {name: predict_entry(machine, load_model(table.model), name, entries[name]) for name in known}
    return found | {name: _collective(machine, name, entries[name]) for name in _LINKS if name in entries}


def _errors(table: CostTable, constants: Constants) -> dict[str, float]:
    return {
        name: float(np.mean(np.abs(seconds / table.entries[name].values - 1.0)))
        for name, seconds in table_predictions(table, constants).items()
    }
