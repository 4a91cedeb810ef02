"""Lengths from a file: the metrics of a run, or one number per line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from plans.errors import SpecError
from plans.lengths import LEVELS, Lengths, Percentiles, keys_of

KINDS = "`metrics.jsonl` of a run, or a file with one number per line"
MOST_BYTES = 256 * 2**20
NAMES = {"prompt": "prompt_length", "response": "response_length"}
"""Part of a sample -> the statistic of a run's metrics."""


def lengths_file(path: Path, *, prompt_tokens: int, response_tokens: int) -> dict[str, Any]:
    """Workload keys for the lengths in a file: of the responses, and of the prompts where metrics hold them.

    Metrics of several iterations count alike. Raises SpecError for an empty file, for lines that are neither metrics
    nor numbers, and for lengths beyond the maximum.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise SpecError(f"--lengths `{path}` has more than {MOST_BYTES:,} bytes", KINDS)
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SpecError(f"cannot read --lengths `{path}`: {reason}", KINDS) from None
    if not lines:
        raise SpecError(f"--lengths `{path}` is empty", KINDS)
    longest = {"prompt": prompt_tokens, "response": response_tokens}
    try:
        if lines[0].lstrip().startswith("{"):
            return _of_metrics([_object(number, line) for number, line in enumerate(lines, 1)], longest)
        values = [_whole(number, line) for number, line in enumerate(lines, 1)]
        return {"response_lengths": keys_of(Lengths.measured(values, response_tokens).percentiles)}
    except SpecError as error:
        raise SpecError(f"--lengths `{path}`: {error.message}", error.hint) from None


def _object(number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise SpecError(f"line {number} is not a line of metrics", KINDS)
    return found


def _whole(number: int, line: str) -> int:
    try:
        return int(line)
    except ValueError:
        raise SpecError(f"line {number}, `{line.strip()[:40]}`, is not a whole number", KINDS) from None


def _of_metrics(lines: Sequence[Mapping[str, Any]], longest: Mapping[str, int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part, name in NAMES.items():
        percentiles = _percentiles(lines, name)
        if percentiles:
            found[f"{part}_lengths"] = keys_of(Lengths(longest[part], percentiles=percentiles).percentiles)
        elif means := _numbers(lines, f"{name}/mean"):
            found[f"mean_{part}_tokens"] = round(Lengths(longest[part], fmean(means)).mean)
    if not found:
        raise SpecError("no line has `response_length/mean` or `response_length/p50`", KINDS)
    return found


def _percentiles(lines: Sequence[Mapping[str, Any]], name: str) -> Percentiles:
    """Means over the iterations of the percentiles that the metrics hold."""
    keys = {float(level): _numbers(lines, f"{name}/p{level:g}") for level in LEVELS}
    return tuple((level, round(fmean(values))) for level, values in keys.items() if values)


def _numbers(lines: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(line[key]) for line in lines if isinstance(line.get(key), int | float)]
