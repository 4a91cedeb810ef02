"""What `realplan profile` does, once its options are parsed. Words go to stderr."""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

from cost_models.calibration.fit import calibrate
from cost_models.engines.constants import DEFAULT_ENGINE, load_constants
from cost_models.tables.shards import legal_degrees
from cost_models.tables.table_file import load_table
from cost_models.tables.tables import CostTable
from plans.errors import RealplanError
from plans.files import check_target
from plans.library import load_model
from plans.runnable import RUN_DTYPES
from profiler.devices import hardware_kind, parse_device
from profiler.profile import ProfileRequest, profile

DEGREES = (1, 2, 4, 8)


def profile_command(model: str, device: str, degrees: str, dtype: str, output: Path) -> int:
    """Profile, write the table, and say how well the analytic model follows it."""
    began = time.perf_counter()
    spec, target = load_model(model), parse_device(device)
    if os.path.exists(model):
        spec = replace(spec, name=str(Path(model).resolve()))  # so that the table finds its architecture again
    precision = dtype or ("bf16" if target.type == "cuda" else "fp32")
    if precision not in RUN_DTYPES:
        raise RealplanError(f"--dtype `{precision}` is unknown", f"one of {', '.join(RUN_DTYPES)}")
    check_target(output)
    _check_output(output, spec.name, hardware_kind(target), precision)
    chosen = _degrees(degrees) if degrees else legal_degrees(spec, DEGREES)
    try:
        table = profile(ProfileRequest(spec=spec, device=target, dtype=precision, degrees=chosen), output)
    except KeyboardInterrupt:
        kept = _points(load_table(output)) if os.path.exists(output) else 0
        raise RealplanError(f"stopped; {kept} points are in {output}", "the same command goes on from there") from None
    _say(table, time.perf_counter() - began, output)
    return 0


def _check_output(output: Path, model: str, hardware: str, precision: str) -> None:
    """Nothing of another kind is overwritten."""
    if os.path.isdir(output):
        raise RealplanError(f"-o {output}: a folder", f"a file in it, for example {output / 'table.json'}")
    if not os.path.exists(output):
        return
    table = load_table(output)
    for key, have, want in (
        ("model", table.model, model),
        ("hardware", table.hardware, hardware),
        ("precision", table.precision, precision),
    ):
        if have != want:
            raise RealplanError(
                f"-o {output}: a cost table of {key} `{have}` is there; this profile is of `{want}`",
                "another file name",
            )


def _degrees(text: str) -> tuple[int, ...]:
    legal = re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", text)
    found = tuple(sorted({int(part) for part in text.split(",")})) if legal else ()
    if not found or found[0] < 1:
        raise RealplanError(f"--tp `{text}` is not a list of degrees", "for example 1,2,4,8")
    return found


def _points(table: CostTable) -> int:
    return sum(entry.values.size for entry in table.entries.values())


def _say(table: CostTable, seconds: float, output: Path) -> None:
    fit = calibrate(table, load_constants(DEFAULT_ENGINE, table.hardware, table.precision))
    print(f"{table.device}: {_points(table)} points of {table.model} in {seconds:.0f} s", file=sys.stderr)
    print(f"{'operation':24}{'spread':>8}{'off after the fit':>20}", file=sys.stderr)
    for name, error in fit.errors.items():
        print(f"{name:24}{table.entries[name].spread:>8.1%}{error:>20.1%}", file=sys.stderr)
    print(f"wrote {output}; use it with `realplan search --table {output}`", file=sys.stderr)
