"""The scripts start, and a fit finds the library and the published rows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
NAMES = (
    "bench_costs",
    "bench_generation",
    "bench_predictions",
    "bench_search",
    "demo",
    "fit_engines",
    "gpu_packages",
    "import_aiconfigurator",
)


def run_script(name: str, *words: str) -> str:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_script_says_what_it_does(name: str) -> None:
    assert "usage:" in run_script(name, "--help")


def test_constants_are_fitted_to_published_rows() -> None:
    found = re.search(r"6 rows, ([\d.]+) % -> ([\d.]+) %", run_script("fit_engines", "--only", "cuda-graphs"))
    assert found is not None
    before, after = float(found[1]), float(found[2])
    assert after < before and after < 12.0
