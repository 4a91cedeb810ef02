"""Options of the test run."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--renew-ledger",
        action="store_true",
        help="write tests/cost_models/ledger.json anew from the present formulas; then read its diff",
    )
    parser.addoption("--fuzz", type=int, default=2000, help="broken inputs that the fuzz suite tries")
    parser.addoption("--plans", type=int, default=6, help="random plans that the invariance suite plays")
    parser.addoption("--damages", type=int, default=30, help="checkpoints that are damaged and must be refused")
    parser.addoption("--kills", type=int, default=6, help="runs that are killed at random moments")
    parser.addoption("--first-plan", type=int, default=0, help="the number of the first of them")


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> int:
    """How many broken inputs to try."""
    return int(request.config.getoption("--fuzz"))
