"""The page of a run, drawn by `realplan report` in a process of its own: the runtime imports no planner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from plans.run_output import PAGE

PATIENCE_S = 300.0


def write_page(output: Path) -> str:
    """Draw the page of an output folder; where it is, or why there is none. A run is no worse without it."""
    command = [sys.executable, "-m", "planner.cli", "report", str(output)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no page of the run: {error}"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it ended without a word"]
        return f"no page of the run: {lines[0]}"
    return f"page: {output / PAGE}"
