"""How far a predicted time may be off: a band from the residuals of published measurements.

`library/residuals.json` holds, per engine and kind of work, quantiles of measured / predicted over rows that the
constants were not fitted to (`scripts/fit_engines.py --residuals`: constants of one random half, rows of the other).
Engines without rows of a kind take those of all engines together, `*`. A plan's calls are taken to err in the same
direction, so that their bands add up: the widest that they can do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from cost_models.estimate import PlanCost
from plans.graph import CallKind

RESIDUALS = Path(str(files("cost_models"))) / "library" / "residuals.json"
ANY_ENGINE = "*"
KINDS: Mapping[str, str] = {
    "step_time_s": "train",
    "prefill_ms": "inference",
    "decode_ms_per_token": "decode",
    "total_latency_ms": "decode",
    "iteration_s": "iteration",
}
"""Measured quantity -> kind of work."""
_KIND_OF = {CallKind.TRAIN_STEP: "train", CallKind.INFERENCE: "inference", CallKind.GENERATE: "decode"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Residuals:
    """measured / predicted of `rows` rows of an engine (`*`: all engines): 10, 50 and 90 % quantiles."""

    engine: str
    kind: str
    rows: int
    low: float
    middle: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBand:
    """Seconds per iteration between which 80 % of measurements would lie, and whose residuals say so."""

    low_s: float
    high_s: float
    rows: int
    engines: tuple[str, ...]

    @property
    def origin(self) -> str:
        """The residuals in words."""
        named = [name for name in self.engines if name != ANY_ENGINE]
        words = [f"engine {', '.join(named)}"] if named else []
        words += ["all engines together, this one having none"] if ANY_ENGINE in self.engines else []
        return f"residuals of {self.rows} published rows of {' and of '.join(words)}"


@lru_cache(maxsize=1)
def residuals() -> tuple[Residuals, ...]:
    """The shipped residuals."""
    return tuple(Residuals(**entry) for entry in json.loads(RESIDUALS.read_text("utf-8"))["entries"])


def residuals_of(engine: str, kind: str) -> Residuals:
    """Those of an engine in a kind of work, or of all engines where it has none."""
    found = {entry.engine: entry for entry in residuals() if entry.kind == kind}
    return found.get(engine) or found[ANY_ENGINE]


def error_band(cost: PlanCost) -> ErrorBand:
    """The band around a plan's iteration time."""
    whole = [entry for entry in residuals() if (entry.engine, entry.kind) == (cost.engine.name, "iteration")]
    shares = dict.fromkeys(whole, 1.0) or _shares(cost)
    return ErrorBand(
        low_s=cost.iteration_s * sum(entry.low * share for entry, share in shares.items()),
        high_s=cost.iteration_s * sum(entry.high * share for entry, share in shares.items()),
        rows=sum(entry.rows for entry in shares),
        engines=tuple(dict.fromkeys(entry.engine for entry in shares)),
    )


def _shares(cost: PlanCost) -> dict[Residuals, float]:
    """Residuals by the share of the calls' seconds that they speak of."""
    graph, shares = cost.program.plan.workload.graph, dict[Residuals, float]()
    seconds = {call: sum(terms.values()) for call, terms in cost.terms.items()}
    for call, value in seconds.items():
        kind = graph.call(call).kind
        entry = residuals_of(cost.engine.running(kind).name, _KIND_OF[kind])
        shares[entry] = shares.get(entry, 0.0) + value / sum(seconds.values())
    return shares
