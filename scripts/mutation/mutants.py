"""Mutants of the sources: what Cosmic Ray changes, where, and a name that stays when the lines around it move."""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_code

ARITHMETIC = ("Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow")
KINDS = ("ReplaceComparisonOperator", "NumberReplacer", "AddNot", "ReplaceAndWithOr", "ReplaceOrWithAnd")


@dataclass(frozen=True)
class Place:
    """One change that an operator of Cosmic Ray makes in a file; lines count from one."""

    file: str
    operator: str
    occurrence: int
    first_line: int
    last_line: int

    def source(self) -> str:
        """The file with the change."""
        kind = cosmic_ray.plugins.get_operator(self.operator)
        changed = mutate_code(Path(self.file).read_text(), kind(), self.occurrence)
        assert changed is not None, f"{self} changes nothing"
        return str(changed)


@dataclass(frozen=True)
class Mutant:
    """A place and its name: file, function, the line as it stands and as it becomes."""

    place: Place
    name: str


def wanted(operator: str) -> bool:
    """Operators that make another formula: no bitwise arithmetic (it fails by type), no decorators and exceptions, and
    not `is` for `==`, which are the same for members of an enumeration."""
    name = operator.removeprefix("core/")
    if name.endswith(("_Eq_Is", "_Is_Eq", "_NotEq_IsNot", "_IsNot_NotEq")):
        return False
    if name.startswith("ReplaceBinaryOperator_"):
        return all(part in ARITHMETIC for part in name.split("_")[1:])
    return name.startswith(KINDS)


def places(file: str) -> Iterator[Place]:
    """Every place of a file, in a fixed order."""
    tree = get_ast_from_path(Path(file))
    nodes = list(ast_nodes(tree))
    for name in sorted(filter(wanted, cosmic_ray.plugins.operator_names())):
        kind = cosmic_ray.plugins.get_operator(name)
        if kind.arguments():
            continue
        operator = kind()
        found = [place for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, (start, end) in enumerate(found):
            yield Place(file, name, occurrence, start[0], end[0])


@lru_cache(maxsize=512)
def _functions(file: str) -> tuple[tuple[int, int, str], ...]:
    """(first line, last line, name) of every function and class of a file, outer ones first."""
    found: list[tuple[int, int, str]] = []

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{prefix}.{child.name}".lstrip(".")
                found.append((child.lineno, child.end_lineno or child.lineno, inner))
            walk(child, inner)

    walk(ast.parse(Path(file).read_text()), "")
    return tuple(found)


def _squeezed(line: str) -> str:
    return re.sub(r"\s+", " ", line).strip()


def named(place: Place) -> Mutant:
    """The mutant of a place."""
    before, after = Path(place.file).read_text().splitlines(), place.source().splitlines()
    row = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), place.first_line - 1)
    inside = [name for first, last, name in _functions(place.file) if first <= row + 1 <= last]
    where = f"{place.file}::{inside[-1]}" if inside else place.file
    return Mutant(place, f"{where}: {_squeezed(before[row])} => {_squeezed(after[row])}")


def sample(files: list[str], count: int, seed: int) -> tuple[list[Mutant], int]:
    """`count` mutants of the files and how many there are.

    Drawn by the hash of seed, file, operator and changed token's line, so that a change elsewhere leaves most of the
    sample as it was.
    """
    drawn, lines, seen = [], {}, Counter[str]()
    for file in files:
        lines[file] = Path(file).read_text().splitlines()
        for place in places(file):
            text = f"{seed} {file} {place.operator} {lines[file][place.first_line - 1].strip()}"
            seen[text] += 1
            drawn.append((hashlib.sha256(f"{text} {seen[text]}".encode()).hexdigest(), place))
    drawn.sort(key=lambda pair: pair[0])
    chosen = (named(place) for _, place in drawn if _compiles(place))
    return list(islice(chosen, count)), len(drawn)


def _compiles(place: Place) -> bool:
    """Whether the change is Python at all (`*` before keyword parameters has no other operator)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `is` with a number is a mutant like any other
            compile(place.source(), place.file, "exec")
    except SyntaxError:
        return False
    return True
