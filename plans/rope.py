"""How rotary positions are scaled beyond the context that a model was first trained on: one record per kind.

The kinds and their formulas are those of `rope_parameters` in Hugging Face configs; frequencies are computed by the
runtime (`runtime/models/rope.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar

from plans.errors import SpecError


class _Checked:
    """Every number of a record is positive and finite."""

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            given = getattr(self, field.name)
            for value in given if isinstance(given, tuple) else (given,):
                if not (math.isfinite(value) and (value > 0 or isinstance(value, bool))):
                    raise SpecError(f"{self.kind} scaling: {field.name} is {value}; it must be a positive number")
        if getattr(self, "original_max_position", 2) < 2:
            raise SpecError(f"{self.kind} scaling: original_max_position is 1; formulas divide by its logarithm")


@dataclass(frozen=True, kw_only=True)
class LinearScaling(_Checked):
    """Positions divided by `factor`."""

    kind = "linear"
    factor: float


@dataclass(frozen=True, kw_only=True)
class DynamicScaling(_Checked):
    """No scaling up to `original_max_position` tokens; beyond, a base that depends on the longest sample of a batch."""

    kind = "dynamic"
    factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(_Checked):
    """Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between them."""

    kind = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class YarnScaling(_Checked):
    """YaRN (arXiv:2309.00071): as Llama 3.1 with a ramp over dimensions; cosines and sines times `attention_factor`.
    truncate: the ends of the ramp are whole dimensions."""

    kind = "yarn"
    factor: float
    original_max_position: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling(_Checked):
    """LongRoPE (arXiv:2402.13753): a divisor for each pair of dimensions, `short_factor` for samples of up to
    `original_max_position` tokens, else `long_factor`; cosines and sines times `attention_factor`."""

    kind = "longrope"
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position: int
    attention_factor: float


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling
SCALINGS: Mapping[str, type[RopeScaling]] = {
    record.kind: record for record in (LinearScaling, DynamicScaling, Llama3Scaling, YarnScaling, LongRopeScaling)
}


def scaling_of(values: Mapping[str, Any]) -> RopeScaling:
    """The record of what `values_of` wrote; without a `kind` it is Llama 3.1's. Raises SpecError for missing and
    superfluous keys."""
    kind = values.get("kind", Llama3Scaling.kind)
    record: Any = SCALINGS[kind]
    known = {field.name: field.default is MISSING for field in fields(record)}
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if key != "kind"}
    missing = [name for name, needed in known.items() if needed and name not in given]
    strange = [name for name in given if name not in known]
    if missing or strange:
        what = f"lacks {', '.join(missing)}" if missing else f"has no {', '.join(strange)}"
        raise SpecError(f"rope_scaling: a {kind} scaling {what}", f"its keys: {', '.join(known)}")
    made: RopeScaling = record(**given)
    return made


def values_of(scaling: RopeScaling) -> dict[str, Any]:
    """A record as the values of a file; Llama 3.1's has no `kind`, as before there were others."""
    kind = {} if isinstance(scaling, Llama3Scaling) else {"kind": scaling.kind}
    return kind | asdict(scaling)
