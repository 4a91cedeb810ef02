"""Runs that are killed end with the metrics of undisturbed ones. `--kills 60` for as many as a release gets."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from warm import start_warm

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    kills = import_module("kill_runs")
    bench = kills.Bench(tmp_path, start_warm)
    count = int(request.config.getoption("--kills"))
    lost = {str(kills.kill_of(number)): fault for number in range(count) if (fault := bench.killed(number))}
    assert not lost
