"""Text files from outside: read within bounds, parsed by safe loaders, every mistake with its line and column.

A reader goes path -> `read_text` -> `parse_json` or `plans.yaml_text.parse_yaml` -> `plans.shapes` (keys and types) ->
its own rules.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Never

from plans.errors import RealplanError
from plans.problems import Path_, Problem, blank_comments, counted, shortened

MOST_BYTES = 2 * 2**20
DEEPEST = 60
LONGEST_NUMBER = 4300  # digits; Python reads no longer ones
_PIPES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
_POINTER = "version https://git-lfs.github.com/spec/"
_JSON_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[{}\[\],:]|[^\s{}\[\],:"]+')


class BadText(RealplanError):
    """A text that cannot be parsed; `problem` says where."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message, problem.hint)
        self.problem = problem


def refuse(error: type[RealplanError], file: Path | str, problems: Iterable[Problem]) -> Never:
    """Raise `error` with every problem of a file, located."""
    raise error("\n".join(problem.text(str(file)) for problem in counted(problems)))


def read_text(path: Path, error: type[RealplanError], what: str, hint: str = "", most: int = MOST_BYTES) -> str:
    """The text of a file, UTF-8 with or without a byte order mark, whatever the locale.

    Raises `error` for a file that cannot be read, is not a regular file or a pipe of the shell, is larger than `most`
    bytes, is not UTF-8 (with line and column), or is the pointer that git-LFS leaves when it did not download.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise error(f"cannot read {what} `{path}`: it is a folder", hint)
        if not stat.S_ISREG(mode) and not str(path).startswith(_PIPES):
            raise error(f"cannot read {what} `{path}`: it is not a regular file", hint)
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as reason:
        raise error(f"cannot read {what} `{path}`: {reason.strerror}", hint) from None
    except RealplanError:  # which is a ValueError
        raise
    except ValueError:
        raise error(f"cannot read {what} {str(path)!r}: no file can have this name", hint) from None
    if len(data) > most:
        raise error(f"{what} `{path}` has more than {most:,} bytes", f"{hint or 'another file'}; it is no {what}")
    text = decoded(data, error, str(path))
    if text.startswith(_POINTER):
        raise error(f"{path}:1:1: this is a git-LFS pointer, not the file itself", "`git lfs pull` in its folder")
    return text


def decoded(data: bytes, error: type[RealplanError], file: str, line: int = 1) -> str:
    """UTF-8 bytes as text without a byte order mark; raises `error` at the first byte that is not UTF-8.

    `line` is the number of the first line of `data` in its file.
    """
    try:
        text = data.decode("utf-8")
        return text.removeprefix("\ufeff") if line == 1 else text
    except UnicodeDecodeError as bad:
        row = line + data.count(b"\n", 0, bad.start)
        column = len(data[data.rfind(b"\n", 0, bad.start) + 1 : bad.start].decode("utf-8", "replace")) + 1
        kind = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "Latin-1"
        raise error(
            f"{file}:{row}:{column}: byte {data[bad.start]:#04x} is not UTF-8",
            f"`iconv -f {kind} -t UTF-8`, if the file is {kind}",
        ) from None


def parse_json(text: str) -> Any:
    """The data of a JSON text; raises BadText for bad syntax, numbers without end, and keys that are given twice."""
    twice = False

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal twice
        found = dict(pairs)
        twice = twice or len(found) < len(pairs)
        return found

    try:
        data = json.loads(text, object_pairs_hook=keep)
    except json.JSONDecodeError as error:
        hint = "a comma or a quote is missing, or there is a comma too many, at or before this place"
        raise BadText(Problem("json", f"not JSON: {error.msg}", hint, (), error.lineno, error.colno)) from None
    except (ValueError, RecursionError):
        raise BadText(_unreadable(text)) from None
    if twice:
        raise BadText(_repeated_key(text))
    return data


def _unreadable(text: str) -> Problem:
    """The number that is too long, or the bracket that stands too deep, of a JSON text that Python does not read."""
    depth = 0
    for match in _JSON_TOKEN.finditer(text):
        token = match.group()
        depth += (token in ("{", "[")) - (token in ("}", "]"))
        if depth > DEEPEST:
            problem = Problem("json", f"brackets stand more than {DEEPEST} deep", f"at most {DEEPEST}")
        elif token[0] != '"' and len(token) > LONGEST_NUMBER:
            problem = Problem("json", f"`{shortened(token)}` is no number that can be read", "a shorter number")
        else:
            continue
        return located(text, match.start(), problem)
    return Problem("json", "not JSON that can be read", "plain numbers and texts", (), 1, 1)


def _repeated_key(text: str) -> Problem:
    """The first key that is given twice in one object."""
    seen: set[Path_] = set()
    for path, _, key_at in _json_values(text):
        if path in seen:
            problem = Problem("duplicate-key", f"key `{shortened(path[-1])}` is given twice", "keep one of them", path)
            return located(text, key_at, problem)
        seen.add(path)
    return Problem("duplicate-key", "a key is given twice", "keep one of them")


def _json_values(text: str) -> Iterator[tuple[Path_, int, int]]:
    """Path, offset of the value and offset of its key (or of the value again) of every value of a legal JSON text."""
    path: list[str | int] = []
    objects: list[bool] = []
    key_next, key_at = False, -1
    for match in _JSON_TOKEN.finditer(text):
        token, at = match.group(), match.start()
        if token in ("}", "]"):
            path.pop(), objects.pop()
            key_next = False
        elif token == ",":
            key_next = objects[-1]
            if not key_next:
                path[-1] = int(path[-1]) + 1
        elif token == ":":
            key_next = False
        elif key_next:
            path[-1], key_at = json.loads(token), at
        else:
            yield tuple(path), at, at if key_at < 0 else key_at
            key_at = -1
            if token in ("{", "["):
                key_next = token == "{"
                objects.append(key_next)
                path.append("" if key_next else 0)


def located(text: str, offset: int, problem: Problem) -> Problem:
    """A problem with the line and column of an offset in the text."""
    line = text.count("\n", 0, offset) + 1
    return replace(problem, line=line, column=offset - text.rfind("\n", 0, offset))


def locate(text: str, problems: Iterable[Problem]) -> list[Problem]:
    """Give the first problems of a JSON text, comments allowed, the place of their value or of its nearest parent."""
    found = list(counted(problems))
    wanted = {p.path[:length] for p in found for length in range(len(p.path) + 1)}
    places = {path: at for path, at, _ in _json_values(blank_comments(text)) if path in wanted}
    placed = []
    for problem in found:
        path = problem.path
        while path and path not in places:
            path = path[:-1]
        placed.append(problem if problem.line else located(text, places.get(path, 0), problem))
    return sorted(placed, key=lambda p: (p.line, p.column))
