"""What `realplan profile` does, once its options are parsed. Words go to stderr."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from cost_models.tables.calibration import calibrate
from cost_models.tables.shards import legal_degrees
from cost_models.tables.tables import CostTable
from cost_models.time.engines import DEFAULT_ENGINE, load_engine
from plans.errors import RealplanError
from plans.library import load_model
from profiler.devices import DTYPES, parse_device
from profiler.profile import Request, profile

DEGREES = (1, 2, 4, 8)


def profile_command(model: str, device: str, degrees: str, dtype: str, output: Path) -> int:
    """Profile, write the table, and say how well the analytic model follows it."""
    began = time.perf_counter()
    spec, target = load_model(model), parse_device(device)
    if Path(model).exists():
        spec = replace(spec, name=str(Path(model).resolve()))  # so that the table finds its architecture again
    precision = dtype or ("bf16" if target.type == "cuda" else "fp32")
    if precision not in DTYPES:
        raise RealplanError(f"--dtype `{precision}` is unknown", f"one of {', '.join(DTYPES)}")
    chosen = _degrees(degrees) if degrees else legal_degrees(spec, DEGREES)
    table = profile(Request(spec=spec, device=target, dtype=precision, degrees=chosen), output)
    _say(table, time.perf_counter() - began, output)
    return 0


def _degrees(text: str) -> tuple[int, ...]:
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or found[0] < 1:
        raise RealplanError(f"--tp `{text}` is not a list of degrees", "for example 1,2,4,8")
    return found


def _say(table: CostTable, seconds: float, output: Path) -> None:
    fit = calibrate(table, load_engine(DEFAULT_ENGINE, table.hardware, table.precision))
    points = sum(entry.values.size for entry in table.entries.values())
    print(f"{table.device}: {points} points of {table.model} in {seconds:.0f} s", file=sys.stderr)
    print(f"{'operation':24}{'spread':>8}{'off after the fit':>20}", file=sys.stderr)
    for name, error in fit.errors.items():
        print(f"{name:24}{table.entries[name].spread:>8.1%}{error:>20.1%}", file=sys.stderr)
    print(f"wrote {output}; use it with `realplan search --table {output}`", file=sys.stderr)
