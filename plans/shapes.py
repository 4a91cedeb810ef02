"""What pydantic finds wrong with the shape of a file's data, as problems with a path, a rule and a legal value."""

from __future__ import annotations

import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from plans.errors import nearest
from plans.problems import MOST_PROBLEMS, Path_, Problem, shortened, value_problem


def shape_problems(model: type[BaseModel], data: Any, error: ValidationError, whole: str) -> list[Problem]:
    """Problems of `data` that should have the shape of `model`; `whole` names the file's kind ("the plan")."""
    found: dict[Path_, Problem] = {}
    for detail in error.errors(include_url=False)[: 4 * MOST_PROBLEMS]:
        problem = _problem(model, data, detail, whole)
        # A value that may be a text or an object fails both ways: what is wrong inside the object says more.
        found = {path: p for path, p in found.items() if path != problem.path[:-1] or p.rule != "value"}
        found.setdefault(problem.path, problem)
    return list(found.values())


def _problem(model: type[BaseModel], data: Any, detail: ErrorDetails, whole: str) -> Problem:
    # Union members add a step such as `ModelFile` to the location; only steps that exist in the data lead somewhere.
    path: list[str | int] = []
    node = data
    for step in detail["loc"]:
        if isinstance(node, dict) and (step in node or detail["type"] == "missing"):
            path.append(step)
            node = node.get(step)
        elif isinstance(node, list) and isinstance(step, int) and step < len(node):
            path.append(step)
            node = node[step]
    key = detail.get("ctx", {}).get("key")  # of a rule that joins several values: the one to blame
    if key is not None and isinstance(node, dict):
        path.append(key)
        detail["input"] = node.get(key)
    where = ".".join(shortened(step) for step in path) or whole
    if detail["type"] == "extra_forbidden":
        known = known_keys(model, tuple(path[:-1]))
        return Problem("unknown-key", f"unknown key `{where}`", nearest(str(path[-1]), known), tuple(path))
    if detail["type"] == "missing":
        parent = tuple(path[:-1])
        return Problem("missing-key", f"key `{path[-1]}` is missing", f'add "{path[-1]}"', parent)
    return value_problem(where, detail, tuple(path))


def known_keys(model: type[BaseModel], path: Path_) -> list[str]:
    """The keys that a file may have at a path."""
    shapes: list[Any] = [model]
    for step in path:
        shapes = [inner for shape in shapes for inner in _below(shape, step)]
    return [
        field.alias or name
        for shape in shapes
        if isinstance(shape, type) and issubclass(shape, BaseModel)
        for name, field in shape.model_fields.items()
    ]


def _below(shape: Any, step: str | int) -> list[Any]:
    """What may stand under a step of a shape, unions taken apart."""
    if isinstance(shape, type) and issubclass(shape, BaseModel):
        return [
            inner
            for name, field in shape.model_fields.items()
            if step in (name, field.alias)
            for inner in _members(field.annotation)
        ]
    if get_origin(shape) in (list, tuple, dict):
        return _members(get_args(shape)[-1])
    return []


def _members(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [inner for member in get_args(annotation) for inner in _members(member)]
    return [annotation]
