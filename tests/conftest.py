"""Options of the test run, and a disk that is soon full."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--renew-ledger",
        action="store_true",
        help="write tests/cost_models/ledger.json anew from the present formulas; then read its diff",
    )
    parser.addoption("--fuzz", type=int, default=2000, help="broken inputs that the fuzz suite tries")
    parser.addoption("--plans", type=int, default=60, help="random plans that the invariance suite plays")
    parser.addoption("--damages", type=int, default=30, help="checkpoints that are damaged and must be refused")
    parser.addoption("--kills", type=int, default=6, help="runs that are killed at random moments")
    parser.addoption("--first-plan", type=int, default=0, help="the number of the first of them")


def pytest_configure(config: pytest.Config) -> None:
    """Workers share one process that starts commands; it imports while they collect."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        from warm import share_warm

        share_warm()


# Files that take minutes. A worker takes a file at a time: with these first, none is left alone with one at the end.
LONG = tuple(
    f"test_{name}.py"
    for name in (
        "random_plans",
        "gpu_check",
        "invariance",
        "training",
        "launchers",
        "machines",
        "kills",
        "wheel",
        "resume",
        "generation",
        "models",
        "restarts",
        "baselines",
        "cli",
        "errors",
    )
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> int:
    """How many broken inputs to try."""
    return int(request.config.getoption("--fuzz"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk with so many free bytes; needs root."""
    place = tmp_path / "small"
    place.mkdir()

    def mount(size: int) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no disk can be mounted: {done.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", "-l", str(place)], capture_output=True)
