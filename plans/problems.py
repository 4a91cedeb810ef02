"""Problems of a file: what is wrong, by which rule, where (line and column), and a legal value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import yaml

Path_ = tuple[str | int, ...]


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


def blank_comments(text: str) -> str:
    """Replace `//` and `/* */` comments outside strings by spaces, so that positions stay."""

    def blank(match: re.Match[str]) -> str:
        found = match.group()
        return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)

    return re.sub(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', blank, text, flags=re.DOTALL)


def locate(text: str, problems: Sequence[Problem]) -> list[Problem]:
    """Give every problem the line and column of its value, or of the nearest parent that exists."""
    try:
        root = yaml.compose(blank_comments(text).replace("\t", " "), Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return list(problems)
    located = []
    for problem in problems:
        mark = _mark(root, problem.path)
        located.append(replace(problem, line=mark[0] + 1, column=mark[1] + 1))
    return sorted(located, key=lambda p: (p.line, p.column))


def _mark(node: yaml.Node | None, path: Path_) -> tuple[int, int]:
    if node is None:
        return 0, 0
    at = (node.start_mark.line, node.start_mark.column)
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if pair is None:
                return at
            node = pair[1]
            mark = node.start_mark
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            mark = node.start_mark
        else:
            return at
        at = (mark.line, mark.column)
        if last:
            return at
    return at
