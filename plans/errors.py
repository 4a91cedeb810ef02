"""Errors that a person caused and can mend: the value, the rule it breaks, and a hint with a legal value."""

from __future__ import annotations

from dataclasses import dataclass


class RealplanError(ValueError):
    """Root of every error that names a wrong input. Picklable, because it crosses process borders."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class SpecError(RealplanError):
    """A model, cluster, mesh or strategy that cannot exist."""


class PlanError(RealplanError):
    """A plan file that cannot be read."""


@dataclass(frozen=True, slots=True)
class Infeasible:
    """A question that was well put and has no answer, such as a model too large for the cluster."""

    reason: str
    hint: str = ""


def nearest(value: str, legal: list[str] | tuple[str, ...]) -> str:
    """A did-you-mean hint: the closest legal names, or all of them when few."""
    import difflib

    close = difflib.get_close_matches(value, legal, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"`{c}`" for c in close) + "?"
    shown = ", ".join(f"`{name}`" for name in list(legal)[:12])
    return f"one of {shown}" + (", ..." if len(legal) > 12 else "")
