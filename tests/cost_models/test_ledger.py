"""No time or memory term moves unseen: every one of many layouts is what `ledger.json` says, to 1e-9.

A change that is meant renews the file: `pytest tests/cost_models/test_ledger.py --renew-ledger`; its diff, a line per
term, is then part of the change.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ledger_cases import CASES, ledger

from cost_models.terms import TERMS, Terms
from plans.errors import SpecError

LEDGER = Path(__file__).with_name("ledger.json")
TOLERANCE, FITTED_TOLERANCE = 1e-9, 1e-5
"""A profiled engine comes from a fit by least squares, which other processors end a little elsewhere."""


@pytest.fixture(scope="module")
def present() -> dict[str, dict[str, dict[str, float]]]:
    return ledger()


def test_every_term_is_what_the_ledger_says(
    present: dict[str, dict[str, dict[str, float]]], request: pytest.FixtureRequest
) -> None:
    rounded = {
        name: {unit: {term: float(f"{value:.12g}") for term, value in terms.items()} for unit, terms in units.items()}
        for name, units in present.items()
    }
    if request.config.getoption("--renew-ledger"):
        LEDGER.write_text(json.dumps(rounded, indent=1) + "\n")
    written = json.loads(LEDGER.read_text())
    assert list(written) == list(rounded)
    moved = []
    for name, units in written.items():
        tolerance = FITTED_TOLERANCE if name.endswith("profiled") else TOLERANCE
        assert {unit: list(terms) for unit, terms in units.items()} == {u: list(t) for u, t in rounded[name].items()}
        for unit, terms in units.items():
            for term, value in terms.items():
                now = present[name][unit][term]
                if now != pytest.approx(value, rel=tolerance, abs=1e-18):
                    moved.append(f"{name}: {term} {value:.12g} -> {now:.12g} {unit}")
    assert not moved, "\n" + "\n".join(moved)


def test_the_ledger_covers_the_layouts_that_differ() -> None:
    strategies = [case.degrees + str(dict(case.settings)) for case in CASES.values()]
    for mark in (" c4", " e8", " v4", "offload", "groups", "waves", "selective", "full", "'sequence_parallel': False"):
        assert any(mark in text for text in strategies), mark
    engines = {case.engine for case in CASES.values()}
    assert {"megatron", "megatron-te", "fsdp", "eager", "cuda-graphs", "native", "real", "table"} <= engines


def test_calls_take_the_terms_of_the_registry_and_no_others(present: dict[str, dict[str, dict[str, float]]]) -> None:
    calls = [units["seconds"] for name, units in present.items() if name in CASES]
    assert {name for terms in calls for name in terms} == set(TERMS)
    with pytest.raises(SpecError, match="unknown time term `linear`"):
        Terms({"linear": np.zeros(1)})


def test_no_term_of_the_ledger_is_zero_everywhere(present: dict[str, dict[str, dict[str, float]]]) -> None:
    largest: dict[tuple[str, str], float] = {}
    for units in present.values():
        for unit, terms in units.items():
            for term, value in terms.items():
                assert value >= 0 or term == "decode_head", (term, value)
                largest[unit, term] = max(largest.get((unit, term), 0.0), value)
    zero = [term for (_, term), value in largest.items() if value == 0.0]
    assert zero == ["nothing moves"]
