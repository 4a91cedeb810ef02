"""Problems of a file: what is wrong, by which rule, where (line and column), and a legal value."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from pydantic_core import ErrorDetails

Path_ = tuple[str | int, ...]
LONGEST_VALUE = 40
MOST_PROBLEMS = 20
_KINDS = {
    "int": ("a whole number", "1"),
    "float": ("a number", "1.0"),
    "finite": ("a finite number", "1.0"),
    "bool": ("true or false", "true"),
    "string": ("a text in quotes", '"..."'),
    "list": ("a list", "[...]"),
    "dict": ("keys with values", "{...}"),
    "model": ("keys with values", "{...}"),
}
"""Start of pydantic's name of a mistake -> what the value must be, and how that is written."""
_LENGTHS = {
    "too_short": ("min_length", "a length of at least"),
    "too_long": ("max_length", "a length of at most"),
    "string_too_short": ("min_length", "a length of at least"),
    "string_too_long": ("max_length", "a length of at most"),
}
REFUSED = "refused"
"""Name of a mistake that a validator of ours finds; it brings its own hint."""
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "less_than_equal": ("le", "at most"),
    "greater_than": ("gt", "above"),
    "less_than": ("lt", "below"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A broken rule. `path` leads to the value in the file; line and column start at 1, 0 when not located."""

    rule: str
    message: str
    hint: str
    path: Path_ = ()
    line: int = 0
    column: int = 0

    def at(self, parent: Path_) -> Problem:
        """The same problem with its path below `parent`."""
        return replace(self, path=(*parent, *self.path))

    def text(self, file: str) -> str:
        """`file:line:column: message`, then the hint."""
        where = f"{file}:{self.line}:{self.column}: " if self.line else f"{file}: "
        hint = f"\n  hint: {self.hint}" if self.hint else ""
        return f"{where}{self.message} [{self.rule}]{hint}"


def shortened(value: object, longest: int = LONGEST_VALUE) -> str:
    """A value as a message shows it: cut in the middle when longer than `longest` characters."""
    if isinstance(value, int) and abs(value) >= 10**LONGEST_VALUE:
        # Python refuses to write out whole numbers of thousands of digits.
        return f"a number of some {round(value.bit_length() * math.log10(2))} digits"
    shown = str(value)
    return shown if len(shown) <= longest else f"{shown[: longest - 16]}...{shown[-8:]}"


def value_problem(where: str, detail: ErrorDetails, path: Path_) -> Problem:
    """The problem of a value of the wrong type or out of its range: the value, the rule, and a legal value."""
    kind, context = detail["type"], detail.get("ctx", {})
    shown = f" is {_shown(detail.get('input'))}"
    key = where.rpartition(".")[2]
    if kind == REFUSED:
        shown = "" if isinstance(detail.get("input"), dict) else shown  # a rule that joins keys of it
        return Problem("not-obeyed", f"{where}{shown}: {detail['msg']}", context["hint"], path)
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound = context[name]
        legal = bound if name in ("ge", "le") else bound + 1 if name == "gt" else bound / 2
        whole = float(bound).is_integer() and (isinstance(bound, int) or abs(bound) < 1e15)
        rule = f"{words} {int(bound):,}" if whole else f"{words} {bound:g}"
        example = f"{legal:g}" if isinstance(legal, float) else str(legal)
        return Problem("value", f"{where}{shown}; it must be {rule}", f'"{key}": {example}, for example', path)
    if kind in _LENGTHS:
        name, words = _LENGTHS[kind]
        rule = f"it must have {words} {context[name]}"
        return Problem("value", f"{where}{shown}; {rule}", f"{words} {context[name]}", path)
    if kind == "string_pattern_mismatch":
        return Problem("value", f"{where}{shown}; a name has letters, digits, `_`, `.`, `+` and `-`", "a_name", path)
    if "expected" in context:
        return Problem("value", f"{where}{shown}, which is unknown", f"one of {context['expected']}", path)
    rule, example = next((words for start, words in _KINDS.items() if kind.startswith(start)), (detail["msg"], ""))
    message = f"{where}{shown}; it must be {rule}" if example else f"{where}{shown}: {rule}"
    return Problem("value", message, f'{rule}: "{key}": {example}' if example else "see `realplan schema`", path)


def _shown(value: Any) -> str:
    """A value as the file writes it; lists and objects by their kind alone."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    whole = isinstance(value, int) and not isinstance(value, bool)
    return shortened(value if whole else json.dumps(value, default=str))


def blank_comments(text: str) -> str:
    """Replace `//` and `/* */` comments outside strings by spaces, so that positions stay."""

    def blank(match: re.Match[str]) -> str:
        found = match.group()
        return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)

    # What is not closed matches to its end, so that no text is scanned twice.
    return re.sub(r'"(?:\\.|[^"\\\n])*"?|//[^\n]*|/\*.*?(?:\*/|\Z)', blank, text, flags=re.DOTALL)


def counted(problems: Iterable[Problem]) -> list[Problem]:
    """The first problems, and how many more there are."""
    found = list(problems)
    if len(found) <= MOST_PROBLEMS:
        return found
    more = f"{len(found) - MOST_PROBLEMS + 1:,} more problems"
    return [*found[: MOST_PROBLEMS - 1], Problem("more", more, "mend these first", found[MOST_PROBLEMS].path)]
