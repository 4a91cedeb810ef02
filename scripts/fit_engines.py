"""Fit the constants of the engines to the published measurements, and write them to the library.

    python scripts/fit_engines.py [--only ENGINE[/GPU]] [--check] [--write] [--residuals]

Each fit takes all rows of one engine on one GPU kind and a handful of constants, by least squares on the logarithm of
predicted / measured (soft L1, so that a few bad runs do not rule), with a weak pull of each constant towards its
analytic start. `--check` also fits on a random half of the rows and reports the error on the other half.
`--residuals` writes how measured times scatter around such predictions (`cost_models.validation.error_band`), and
nothing else.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import least_squares, minimize_scalar

from cost_models.engines.constants import DEFAULT_ENGINE, Constants, load_constants
from cost_models.engines.engine import Abilities, Engine
from cost_models.engines.machine import Machine, machine_of
from cost_models.validation import published
from cost_models.validation.error_band import ANY_ENGINE, KINDS, RESIDUALS
from cost_models.validation.predictions import PREDICTORS
from cost_models.validation.published import Row, Unpredictable
from cost_models.validation.row_results import counts
from plans.cluster import ClusterSpec
from plans.graph import CallKind

LIBRARY = Path(str(files("cost_models"))) / "library" / "engines.json"
PULL = 0.1
FEWEST_TO_HALVE = 6


@dataclass(frozen=True)
class Fit:
    """Constants of an engine on a GPU kind, and the quantities of the rows that determine them; `also` names groups
    whose rows take part although they do not count for the figures."""

    engine: str
    gpu: str
    constants: tuple[str, ...]
    quantities: tuple[str, ...]
    also: tuple[str, ...] = ()


DENSE = ("gemm_efficiency", "hidden_passes", "attention_efficiency")
DECODE = ("memory_efficiency", "kv_efficiency", "decode_layer_s", "link_latency_s")
STEP = ("step_time_s",)
FITS = (
    Fit("megatron-unfused", "a100-80gb", ("gemm_efficiency", "softmax_passes", "step_s"), STEP),
    Fit(
        "megatron-deepspeed",
        "a100-80gb",
        (
            "gemm_efficiency",
            "softmax_passes",
            "layer_gap_s",
            "micro_batch_s",
            "network_efficiency",
            "pipeline_efficiency",
            "host_forward_layer_s",
            "host_backward_layer_s",
            "gemm_half_extent",
            "hidden_passes",
        ),
        STEP,
        also=("vtrain-single",),
    ),
    Fit("megatron-te", "a100-80gb", ("gemm_efficiency",), STEP),
    Fit("megatron-te", "h100-80gb-sxm", ("gemm_efficiency", "hidden_passes", "attention_efficiency"), STEP),
    Fit("megatron-te", "b200-180gb", (*DENSE, "layer_gap_s"), STEP),
    Fit("fsdp", "a100-40gb", (*DENSE, "network_efficiency", "data_overlap"), STEP),
    Fit("fsdp", "a100-80gb", (*DENSE, "data_overlap"), STEP),
    Fit("fsdp", "h100-80gb-sxm", (*DENSE, "network_efficiency", "data_overlap"), STEP),
    *(
        Fit(
            "eager",
            gpu,
            (
                "gemm_efficiency",
                "link_efficiency",
                "host_forward_layer_s",
                "layer_gap_s",
                "memory_efficiency",
                "kv_efficiency",
                "host_decode_layer_s",
                "decode_step_s",
                "decode_row_s",
            ),
            ("prefill_ms", "decode_ms_per_token"),
        )
        for gpu in ("a100-80gb", "h100-80gb-sxm")
    ),
    Fit("cuda-graphs", "a100-80gb", ("memory_efficiency", "decode_layer_s"), ("decode_ms_per_token",)),
    Fit(
        "native",
        "a100-80gb",
        (*DECODE, "gemm_efficiency", "layer_gap_s", "network_latency_s", "network_efficiency", "decode_row_s"),
        ("total_latency_ms",),
    ),
    Fit(
        "trt-llm",
        "a100-80gb",
        ("memory_efficiency", "kv_efficiency", "gemm_efficiency", "decode_row_s", "decode_layer_s"),
        ("total_latency_ms", "prefill_ms"),
    ),
    Fit(
        "real",
        "a100-80gb",
        ("gemm_efficiency", "host_decode_layer_s", "decode_step_s", "micro_batch_s", "call_s"),
        ("iteration_s",),
    ),
)


THROTTLED = {
    ("a100-80gb", "a100-40gb", "a800-80gb"): ("megatron-te", "megatron-unfused"),
    ("h100-80gb-sxm", "h200-141gb", "h800-80gb"): ("megatron-te",),
    ("b200-180gb", "b300-288gb"): ("megatron-te",),
}
"""GPU kinds of one chip -> engines whose rows on the first tell how far running kernels fall behind measured ones."""

Case = tuple[Row, str]


def cases_of(fit: Fit) -> list[Case]:
    """The rows and quantities that count for a fit."""
    found = []
    for path in published.library_files():
        for row in published.read_rows(path):
            for quantity in set(row["measured"]) & set(fit.quantities):
                taken = counts(row, quantity) or row.get("group") in fit.also
                if taken and _belongs(row, quantity, fit):
                    found.append((row, quantity))
    return sorted(found, key=lambda case: (case[0]["id"], case[1]))


def _belongs(row: Row, quantity: str, fit: Fit) -> bool:
    try:
        if quantity == "iteration_s":
            return fit.engine == "real"
        PREDICTORS[quantity](row)
        named = published.train_engine_name(row) if quantity in STEP else published.inference_engine_name(row)
        return named == fit.engine and published.row_cluster(row).gpu.name == fit.gpu
    except Unpredictable:
        return False


@dataclass(frozen=True, eq=False)
class Trial:
    """An engine of constants that are being fitted."""

    constants: Constants
    name: str = "trial"
    abilities: Abilities = field(default_factory=Abilities)

    def running(self, kind: CallKind) -> Engine:
        """Itself."""
        return self

    def on(self, cluster: ClusterSpec, dtype: str) -> Machine:
        """Any cluster with these constants."""
        return machine_of(cluster, self.constants, dtype)


def errors(constants: Constants, cases: Sequence[Case]) -> NDArray[np.float64]:
    """log(predicted / measured) of each case under an engine's constants."""
    trial = Trial(constants)
    return np.array([np.log(PREDICTORS[q](row, lambda _: trial) / row["measured"][q]) for row, q in cases])


SHARES = {f.name for f in fields(Constants) if f.name.endswith(("efficiency", "overlap"))}
CAPS = {"gemm_efficiency": 0.95, "memory_efficiency": 0.95, "kv_efficiency": 0.95, "link_efficiency": 0.95}
"""Largest shares of a peak that a fit may claim; 1 for the others."""


def solve(fit: Fit, cases: Sequence[Case], start: Constants) -> Constants:
    """The constants that fit the cases best."""
    initial = np.array([getattr(start, name) or (0.5 if name in SHARES else 1e-6) for name in fit.constants])
    low = np.log(np.where([name in SHARES for name in fit.constants], 0.02, initial / 50))
    high = np.log(
        np.where([n in SHARES for n in fit.constants], [CAPS.get(n, 1.0) for n in fit.constants], initial * 50)
    )
    origin = np.clip(np.log(initial), low + 1e-6, high - 1e-6)

    def constants_at(point: NDArray[np.float64]) -> Constants:
        found: dict[str, Any] = dict(zip(fit.constants, np.exp(point).tolist(), strict=True))
        return replace(start, **found)

    def residuals(point: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([errors(constants_at(point), cases), PULL * (point - origin)])

    found = least_squares(
        residuals, origin, bounds=(low, high), loss="soft_l1", f_scale=0.1, x_scale=0.3, max_nfev=40, diff_step=1e-3
    )
    return constants_at(found.x)


def mape(constants: Constants, cases: Sequence[Case]) -> float:
    """Mean absolute percentage error."""
    return 100 * float(np.mean(np.abs(np.expm1(errors(constants, cases)))))


def held_out(fit: Fit, cases: Sequence[Case], start: Constants) -> tuple[list[Case], NDArray[np.float64]]:
    """Cases and log(predicted / measured) under constants fitted to the random half that a case is not in."""
    shuffled = list(cases)
    random.Random(0).shuffle(shuffled)
    halves = shuffled[::2], shuffled[1::2]
    found = [errors(solve(fit, other, start), half) for half, other in (halves, halves[::-1])]
    return [*halves[0], *halves[1]], np.concatenate(found)


def quantiles(ratios: pd.DataFrame) -> list[dict[str, object]]:
    """Entries of the residuals: columns engine, kind and ratio by engine and kind, and over all engines by kind."""
    every = pd.concat([ratios, ratios.assign(engine=ANY_ENGINE)])
    grouped = every.groupby(["engine", "kind"])["ratio"]
    table = grouped.quantile([0.1, 0.5, 0.9]).unstack().round(4).set_axis(["low", "middle", "high"], axis=1)
    table.insert(0, "rows", grouped.size())
    return table.reset_index().to_dict("records")


def write_residuals() -> None:
    """Quantiles of measured / predicted by engine and kind of work, over rows that the constants were not fitted to."""
    found = []
    for fit in FITS:
        cases, start = cases_of(fit), general_constants(fit)
        if len(cases) < FEWEST_TO_HALVE:
            continue
        ordered, logs = held_out(fit, cases, start)
        kinds = [KINDS[quantity] for _, quantity in ordered]
        found.append(pd.DataFrame({"engine": fit.engine, "kind": kinds, "ratio": np.exp(-logs)}))
        print(f"{fit.engine} on {fit.gpu}: {100 * np.mean(np.abs(np.expm1(logs))):.1f} % on rows not fitted")
    lines = ",\n".join("    " + json.dumps(entry) for entry in quantiles(pd.concat(found)))
    RESIDUALS.write_text('{\n  "entries": [\n' + lines + "\n  ]\n}\n")


def write(fit: Fit, constants: Constants, rows: int, of: str = "") -> None:
    """Put the fitted constants into the library; `of` says whose rows they are if not the engine's own."""
    library = json.loads(LIBRARY.read_text())
    key = {"engine": fit.engine, "gpu": fit.gpu, "precision": "bf16"}
    kept = [e for e in library["entries"] if {k: e[k] for k in key} != key]
    fitted = {name: float(f"{getattr(constants, name):.4g}") for name in fit.constants}
    origin = f"fitted to {rows} published {', '.join(fit.quantities)}{of} by scripts/fit_engines.py"
    entries = [*kept, key | {"origin": origin, "constants": fitted}]
    lines = ",\n".join("    " + json.dumps(entry) for entry in entries)
    engines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(record)}" for name, record in library["engines"].items())
    LIBRARY.write_text('{\n  "engines": {\n' + engines + '\n  },\n  "entries": [\n' + lines + "\n  ]\n}\n")


def throttle(gpu: str, engines: Sequence[str]) -> tuple[float, int]:
    """The `throttle` with which measured kernels fit the rows of some engines best, which keep their other constants;
    and how many rows those are."""
    fits = [fit for fit in FITS if fit.gpu == gpu and fit.engine in engines]
    rows = [(replace(load_constants(fit.engine, gpu), measured_kernels=True), cases_of(fit)) for fit in fits]

    def error(value: float) -> float:
        parts = [errors(replace(start, throttle=value), cases) for start, cases in rows]
        return float(np.mean(np.abs(np.concatenate(parts))))

    found = minimize_scalar(error, bounds=(0.0, 1.0), method="bounded", options={"xatol": 0.005})
    return float(found.x), sum(len(cases) for _, cases in rows)


def general_constants(fit: Fit) -> Constants:
    """Where a fit starts: the library's constants for any GPU, and the GPU's links."""
    library = json.loads(LIBRARY.read_text())["entries"]
    constants = Constants()
    for name, gpu in (("*", "*"), ("*", fit.gpu), (fit.engine, "*")):
        for entry in library:
            if (entry["engine"], entry["gpu"]) == (name, gpu):
                constants = replace(constants, **entry["constants"])
    return constants


def main() -> None:
    """Fit and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--residuals", action="store_true")
    args = parser.parse_args()
    if args.residuals:
        write_residuals()
        return
    for fit in FITS:
        if not f"{fit.engine}/{fit.gpu}".startswith(args.only):
            continue
        cases, start = cases_of(fit), general_constants(fit)
        found = solve(fit, cases, start)
        print(f"{fit.engine} on {fit.gpu}: {len(cases)} rows, {mape(start, cases):.1f} % -> {mape(found, cases):.1f} %")
        print("   ", ", ".join(f"{n} {getattr(start, n):.3g} -> {getattr(found, n):.3g}" for n in fit.constants))
        if args.check and len(cases) >= FEWEST_TO_HALVE:
            missed = np.mean(np.abs(np.expm1(held_out(fit, cases, start)[1])))
            print(f"    on the half not fitted: {100 * missed:.1f} %")
        if args.write:
            write(fit, found, len(cases))
    for gpus, engines in THROTTLED.items():
        if not f"{DEFAULT_ENGINE}/{gpus[0]}".startswith(args.only):
            continue
        value, rows = throttle(gpus[0], engines)
        print(f"{DEFAULT_ENGINE} on {', '.join(gpus)}: throttle {value:.3f} from {rows} rows of {', '.join(engines)}")
        for gpu in gpus if args.write else ():
            fit = Fit(DEFAULT_ENGINE, gpu, ("throttle",), STEP)
            write(fit, Constants(throttle=value), rows, f" of {', '.join(engines)} on {gpus[0]}")


if __name__ == "__main__":
    main()
