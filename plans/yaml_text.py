"""YAML texts from outside: YAML 1.2's plain values, within bounds, every mistake with its line and column."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import yaml

from plans.documents import DEEPEST, BadText, located
from plans.problems import Path_, Problem, counted, shortened

MOST_YAML_BYTES = 2**18
MOST_VALUES = 200_000
_DASHES = re.compile(rf"(?:[-?:] ){{{DEEPEST},}}")


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
        raise BadText(located(text, deep, problem))
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
        raise BadText(located(text, min(at, len(text)), problem)) from None
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
    node, _ = _node_at(node, problem.path)
    return problem if node is None else _at_mark(node, problem)


def _node_at(node: yaml.Node | None, path: Path_) -> tuple[yaml.Node | None, int]:
    """The node at a path or its nearest parent, and how many steps of the path lead there (-1: no node at all)."""
    if node is None:
        return None, -1
    for done, step in enumerate(path):
        inner = None
        if isinstance(node, yaml.MappingNode):
            inner = next((value for key, value in node.value if key.value == str(step)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            inner = node.value[step]
        if inner is None:
            return node, done
        node = inner
    return node, len(path)
