"""Lengths that a run leaves in its metrics, and lengths from a file: such metrics, or one number per line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from plans.documents import BadText, parse_json, read_text
from plans.errors import SpecError
from plans.lengths import LEVELS, Lengths, interpolated, keys_of
from plans.problems import shortened
from plans.run_output import METRICS

KINDS = "the output folder of a run, its `metrics.jsonl`, or a file with one number per line"
MOST_BYTES = 256 * 2**20
NAMES = {"prompt": "prompt_length", "response": "response_length"}
"""Part of a sample -> the statistic of a run's metrics."""
OPTIONS = {"prompt": "--prompt-lengths", "response": "--lengths"}
"""Part of a sample -> the option that a file of numbers is given with."""
RECORDED = (0, *range(5, 91, 10), 90, 95, 98, 99, 99.5, 100)
"""Percentiles that a run records, out of `LEVELS`."""


def recorded(lengths: Sequence[tuple[int, int]]) -> dict[str, float]:
    """What a run records of the prompt and response tokens of an iteration's samples: `response_length/p50`, ..."""
    found: dict[str, float] = {}
    for name, values in zip(NAMES.values(), zip(*lengths, strict=True), strict=True):
        ordered = sorted(values)
        found |= {f"{name}/p{level:g}": interpolated(ordered, level / 100) for level in RECORDED}
    return found


@dataclass(frozen=True)
class _Line:
    """A line that is not empty: its place in the file, number from 1, and text without what follows it."""

    path: Path
    number: int
    text: str

    def refuse(self, message: str, hint: str, column: int = 1) -> SpecError:
        """The error of this line."""
        return SpecError(f"{self.path}:{self.number}:{column}: {message}", hint)


def lengths_file(
    path: Path, *, prompt_tokens: int, response_tokens: int, part: Literal["prompt", "response"] = "response"
) -> dict[str, Any]:
    """Workload keys for the lengths in a file.

    Numbers are lengths of `part`. Metrics hold both: for `prompt` those of the prompts alone are taken. A folder means
    the metrics in it. Metrics of several iterations count alike. Raises SpecError, located, for an empty file, for
    lines that are neither metrics nor numbers, and for lengths beyond the maximum.
    """
    path = path / METRICS if os.path.isdir(path) else path
    lines = _lines(path, OPTIONS[part])
    if not lines:
        raise SpecError(f"{OPTIONS[part]} `{path}` is empty", KINDS)
    longest = {"prompt": prompt_tokens, "response": response_tokens}
    if not lines[0].text.lstrip().startswith("{"):
        values = [_length(line, longest[part]) for line in lines]
        return {f"{part}_lengths": keys_of(Lengths.measured(values, longest[part]).percentiles)}
    parts = ["prompt"] if part == "prompt" else list(NAMES)
    return _of_metrics([(line, _object(line)) for line in lines], {name: longest[name] for name in parts})


def metrics_rows(path: Path) -> list[dict[str, Any]]:
    """The iterations of a file of metrics, a mapping each. Raises SpecError, located, for a line that is none."""
    return [_object(line) for line in _lines(path, OPTIONS["response"])]


def _lines(path: Path, option: str) -> list[_Line]:
    text = read_text(path, SpecError, option, KINDS, MOST_BYTES)
    return [_Line(path, i, line.rstrip()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _length(line: _Line, longest: int) -> int:
    if not re.fullmatch(r"\s*[+-]?[0-9]{1,15}", line.text):
        raise line.refuse(f"`{shortened(line.text.strip())}` is not a whole number", KINDS)
    value = int(line.text)
    if not 0 <= value <= longest:
        rule = f"lengths must be from 0 to the maximum, {longest}"
        raise line.refuse(f"a length of {value} tokens; {rule}", f"a maximum of {max(value, 1)} tokens")
    return value


def _object(line: _Line) -> dict[str, Any]:
    try:
        found = parse_json(line.text)
    except BadText as error:
        raise line.refuse(error.problem.message, KINDS, error.problem.column or 1) from None
    if not isinstance(found, dict):
        raise line.refuse("not a line of metrics", KINDS)
    return found


def _of_metrics(lines: Iterable[tuple[_Line, Mapping[str, Any]]], longest: Mapping[str, int]) -> dict[str, Any]:
    """Workload keys for the parts of a sample that `longest` names."""
    found: dict[str, Any] = {}
    rows = list(lines)
    for part, most in longest.items():
        name = NAMES[part]
        keys = {float(level): _numbers(rows, f"{name}/p{level:g}", most) for level in LEVELS}
        percentiles = tuple((level, round(fmean(values))) for level, values in keys.items() if values)
        try:
            if percentiles:
                found[f"{part}_lengths"] = keys_of(Lengths(most, percentiles=percentiles).percentiles)
            elif means := _numbers(rows, f"{name}/mean", most):
                found[f"mean_{part}_tokens"] = round(Lengths(most, fmean(means)).mean)
        except SpecError as error:
            raise rows[0][0].refuse(error.message, error.hint) from None
    if not found:
        name = NAMES[list(longest)[-1]]
        raise rows[0][0].refuse(f"no line has `{name}/mean` or `{name}/p50`", KINDS)
    return found


def _numbers(rows: Iterable[tuple[_Line, Mapping[str, Any]]], key: str, longest: int) -> list[float]:
    """The values of a key; null, which metrics have for what is not finite, is left out."""
    values = []
    for line, row in rows:
        value = row.get(key)
        if value is None:
            continue
        at = max(line.text.find(f'"{key}"'), 0) + 1
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= longest:  # NaN fails
            rule = f"it must be a number of tokens from 0 to the maximum, {longest}"
            raise line.refuse(f"{key} is {shortened(value)}; {rule}", f'"{key}": {longest}, or a higher maximum', at)
        values.append(float(value))
    return values
