"""Text files from outside: read within bounds, parsed by safe loaders, every mistake with its line and column.

A reader goes path -> `read_text` -> `parse_json` or `parse_yaml` -> `plans.shapes` (keys and types) -> its own rules.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Never

import yaml

from plans.errors import RealplanError
from plans.problems import Path_, Problem, blank_comments, counted, shortened

MOST_BYTES = 2 * 2**20
MOST_YAML_BYTES = 2**18
MOST_VALUES = 200_000
DEEPEST = 60
LONGEST_NUMBER = 4300  # digits; Python reads no longer ones
_PIPES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
_POINTER = "version https://git-lfs.github.com/spec/"
_DASHES = re.compile(rf"(?:[-?:] ){{{DEEPEST},}}")
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
        return _located(text, match.start(), problem)
    return Problem("json", "not JSON that can be read", "plain numbers and texts", (), 1, 1)


def _repeated_key(text: str) -> Problem:
    """The first key that is given twice in one object."""
    seen: set[Path_] = set()
    for path, _, key_at in _json_values(text):
        if path in seen:
            problem = Problem("duplicate-key", f"key `{shortened(path[-1])}` is given twice", "keep one of them", path)
            return _located(text, key_at, problem)
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


def _located(text: str, offset: int, problem: Problem) -> Problem:
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
        placed.append(problem if problem.line else _located(text, places.get(path, 0), problem))
    return sorted(placed, key=lambda p: (p.line, p.column))


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML's safe loader with the numbers and truths of YAML 1.2: `010`, `1_0`, `0x1`, `1:30`, `no` and dates stay
    text, and `1e-6` is a number."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", "-+0123456789."),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


@dataclass(frozen=True)
class Yaml:
    """A YAML text: its data, and its nodes, which know their places."""

    data: Any
    root: yaml.Node | None

    def locate(self, problems: Iterable[Problem]) -> list[Problem]:
        """Give the first problems the place of their value, or of the nearest parent that exists."""
        placed = [p if p.line else _at_node(self.root, p) for p in counted(problems)]
        return sorted(placed, key=lambda p: (p.line, p.column))


def parse_yaml(text: str) -> Yaml:
    """The data of a YAML text. Raises BadText, located, for bad syntax, tags, keys that are not texts or are given
    twice, numbers without end, and aliases that unfold to more than `MOST_VALUES` values."""
    deep = _too_deep(text)
    if deep is not None:
        problem = Problem("yaml", f"brackets stand more than {DEEPEST} deep", f"at most {DEEPEST}")
        raise BadText(_located(text, deep, problem))
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        message = f"not YAML: {error.problem or error.context}"
        raise BadText(Problem("yaml", message, "indent with spaces, quote texts with `:` or `#`", (), *place)) from None
    except yaml.YAMLError as error:
        at = getattr(error, "position", 0)
        problem = Problem(
            "yaml", f"not YAML: {getattr(error, 'reason', error)}", "plain text without control characters"
        )
        raise BadText(_located(text, min(at, len(text)), problem)) from None
    except (RecursionError, ValueError):
        reason = "not YAML that can be read: it is nested too deep, or holds half of a surrogate pair"
        raise BadText(Problem("yaml", reason, "fewer levels, plain text", (), 1, 1)) from None
    return Yaml(_Builder().value(root, ()) if root is not None else None, root)


def _too_deep(text: str) -> int | None:
    """Where flow brackets, or dashes on one line, nest too deep, by an upper bound; None where they do not."""
    deep = 0
    for found in re.finditer(r"[\[{\]}]", text):
        deep = max(0, deep + (1 if found.group() in "[{" else -1))
        if deep > DEEPEST:
            return found.start()
    dashes = _DASHES.search(text)
    return dashes.start() if dashes else None


class _Builder:
    """Plain values of YAML nodes; counts them, because aliases may unfold without end."""

    def __init__(self) -> None:
        self.values = 0

    def value(self, node: yaml.Node, path: Path_) -> Any:
        self.values += 1
        if self.values > MOST_VALUES or len(path) > DEEPEST:
            most = f"at most {MOST_VALUES:,} values, {DEEPEST} levels deep"
            raise BadText(_at_mark(node, Problem("yaml", "too many values, or a list inside itself", most, path)))
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        return _scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, item in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise BadText(_at_mark(key_node, Problem("yaml", "a key must be a text", "key: value", path)))
            if key in found:
                problem = Problem("duplicate-key", f"key `{shortened(key)}` is given twice", "keep one of them", path)
                raise BadText(_at_mark(key_node, problem))
            found[key] = self.value(item, (*path, key))
        return found


def _scalar(node: yaml.Node, path: Path_) -> Any:
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind not in ("str", "int", "float", "bool", "null"):
        problem = Problem("yaml", f"tag `{shortened(node.tag)}` is not allowed", "a plain value without a tag", path)
        raise BadText(_at_mark(node, problem))
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        problem = Problem("yaml", f"`{shortened(text)}` is no number that can be read", "a shorter number", path)
        raise BadText(_at_mark(node, problem)) from None
    if kind == "bool":
        return text.lower() == "true"
    return None if kind == "null" else text


def _at_mark(node: yaml.Node, problem: Problem) -> Problem:
    return replace(problem, line=node.start_mark.line + 1, column=node.start_mark.column + 1)


def _at_node(node: yaml.Node | None, problem: Problem) -> Problem:
    if node is None:
        return problem
    for step in problem.path:
        inner = None
        if isinstance(node, yaml.MappingNode):
            inner = next((value for key, value in node.value if key.value == str(step)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            inner = node.value[step]
        if inner is None:
            break
        node = inner
    return _at_mark(node, problem)
