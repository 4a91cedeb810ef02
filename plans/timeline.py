"""Timeline: spans of work on ranks, the same type predicted and measured, so that comparing them is a subtraction."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plans.errors import PlanError
from plans.files import write_atomically

FORMAT = "realplan-timeline/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Work of one step on some ranks. `name` is the step's, `kind` a StepKind, times in seconds from the start."""

    name: str
    kind: str
    iteration: int
    start_s: float
    end_s: float
    ranks: tuple[int, ...]

    @property
    def duration_s(self) -> float:
        """Length of the span."""
        return self.end_s - self.start_s


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Spans of a few iterations. `source` is `predicted` or `measured`; period_s the steady-state iteration time."""

    source: str
    period_s: float
    spans: tuple[Span, ...]

    def call_seconds(self) -> dict[str, float]:
        """Mean duration of each step name over the iterations it appears in, the slowest rank counting."""
        longest: dict[tuple[str, int], float] = {}
        for span in self.spans:
            key = (span.name, span.iteration)
            longest[key] = max(longest.get(key, 0.0), span.duration_s)
        by_name: dict[str, list[float]] = {}
        for (name, _), seconds in longest.items():
            by_name.setdefault(name, []).append(seconds)
        return {name: sum(values) / len(values) for name, values in by_name.items()}

    def iteration(self, number: int) -> tuple[Span, ...]:
        """Spans of one iteration."""
        return tuple(span for span in self.spans if span.iteration == number)

    def save(self, path: Path) -> None:
        """Write the timeline as JSON, one span per line."""
        head = {"format": FORMAT, "source": self.source, "period_s": self.period_s}
        lines = ",\n".join("  " + json.dumps(_plain(span)) for span in self.spans)
        write_atomically(path, json.dumps(head)[:-1] + ', "spans": [\n' + lines + "\n]}\n")


def _plain(span: Span) -> dict[str, Any]:
    data = asdict(span)
    data["start_s"], data["end_s"] = round(span.start_s, 6), round(span.end_s, 6)
    return data


def load_timeline(path: Path) -> Timeline:
    """Read a timeline file."""
    try:
        data = json.loads(path.read_text())
        spans = tuple(Span(**{**span, "ranks": tuple(span["ranks"])}) for span in data["spans"])
        return Timeline(source=data["source"], period_s=data["period_s"], spans=spans)
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise PlanError(f"{path}: not a timeline: {error}", "a timeline.json that realrun wrote") from None
