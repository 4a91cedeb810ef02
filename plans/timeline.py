"""Timeline: spans of work on ranks, the same type predicted and measured, so that comparing them is a subtraction."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from plans.cluster import MOST_GPUS
from plans.documents import BadText, locate, parse_json, read_text, refuse
from plans.errors import PlanError
from plans.files import write_atomically
from plans.problems import Problem
from plans.shapes import shape_problems

FORMAT = "realplan-timeline/1"
MOST_TIMELINE_BYTES = 64 * 2**20


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


class _SpanFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True, allow_inf_nan=False)

    name: str
    kind: str
    iteration: Annotated[int, Field(ge=-(10**9), le=10**9)]
    start_s: float
    end_s: float
    ranks: list[Annotated[int, Field(ge=0, le=MOST_GPUS)]]


class _TimelineFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True, allow_inf_nan=False)

    format: Literal["realplan-timeline/1"]
    source: Literal["predicted", "measured"]
    period_s: Annotated[float, Field(ge=0)]
    spans: list[_SpanFile]


def load_timeline(path: Path) -> Timeline:
    """Read a timeline file; raises PlanError with every located problem."""
    hint = "a timeline.json that realrun wrote"
    text = read_text(path, PlanError, "timeline", hint, MOST_TIMELINE_BYTES)
    try:
        data = parse_json(text)
        file = _TimelineFile.model_validate(data)
    except BadText as error:
        refuse(PlanError, path, [error.problem])
    except ValidationError as error:
        refuse(PlanError, path, locate(text, shape_problems(_TimelineFile, data, error, "a timeline")))
    for i, span in enumerate(file.spans):
        if span.end_s < span.start_s:
            message = f"spans.{i} ends at {span.end_s:g} s, before it starts at {span.start_s:g} s"
            refuse(PlanError, path, locate(text, [Problem("value", message, hint, ("spans", i, "end_s"))]))
    spans = tuple(Span(**{**span.model_dump(), "ranks": tuple(span.ranks)}) for span in file.spans)
    return Timeline(source=file.source, period_s=file.period_s, spans=spans)
