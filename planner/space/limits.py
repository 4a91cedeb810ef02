"""What the user rules in or out of the space: `actor_train.tp=4` pinned, `critic_train.pp>2` forbidden.

A rule names a call (`*`: every call), a field of its mesh or strategy, a comparison and a value.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plans.cluster import GIB, ClusterSpec, DeviceMesh
from plans.errors import SpecError, nearest
from plans.problems import shortened
from plans.strategy import SETTINGS, ParallelStrategy

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_RULE = re.compile(r"\s*([\w*]+)\.(\w+)\s*(>=|<=|!=|==|=|<|>)\s*(.+?)\s*")
_OF_MESH: Mapping[str, type] = {"gpus": int, "nodes": int, "first_node": int, "mesh": str}
FIELDS: Mapping[str, type] = {
    **{name: setting.type for name, setting in SETTINGS.items() if setting.type is not tuple},
    **_OF_MESH,
}
"""What a rule can name: fields of a strategy and of its mesh, with the type of their values."""
_TRUTH = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


@dataclass(frozen=True, slots=True)
class Rule:
    """One comparison; `text` is what the user wrote."""

    call: str
    field: str
    comparison: str
    value: int | bool | str
    text: str

    def holds(self, mesh: DeviceMesh, strategy: ParallelStrategy, cluster: ClusterSpec) -> bool:
        """Whether a layout has the property."""
        return self.compares(self.value_of(mesh, strategy, cluster))

    def compares(self, value: int | bool | str) -> bool:
        """Whether a value of the field is as the rule says."""
        return _COMPARISONS[self.comparison](value, self.value)

    def value_of(self, mesh: DeviceMesh, strategy: ParallelStrategy, cluster: ClusterSpec) -> int | bool | str:
        """What a layout has in the field of the rule."""
        return _field(self.field, mesh, strategy, cluster)


def _field(name: str, mesh: DeviceMesh, strategy: ParallelStrategy, cluster: ClusterSpec) -> int | bool | str:
    if name == "mesh":
        return mesh.text(cluster)
    if name == "gpus":
        return mesh.size
    if name in ("nodes", "first_node"):
        return int(getattr(mesh, name))
    value: int | bool | str = getattr(strategy, name)
    return str(value) if name == "recompute" else value


def parse_rule(text: str, calls: Sequence[str]) -> Rule:
    """Read a rule; errors name the part that is wrong."""
    match = _RULE.fullmatch(text)
    if not match:
        raise SpecError(
            f"rule `{shortened(text)}` is not of the form call.field=value", "for example `actor_train.tp=4`"
        )
    call, field, comparison, value = match.groups()
    if call != "*" and call not in calls:
        raise SpecError(f"rule `{shortened(text)}`: no call `{shortened(call)}`", nearest(call, list(calls)))
    if field not in FIELDS:
        raise SpecError(f"rule `{shortened(text)}`: unknown field `{shortened(field)}`", nearest(field, list(FIELDS)))
    return Rule(call, field, comparison, _value(text, field, comparison, value.strip("\"'")), text)


def _value(text: str, field: str, comparison: str, value: str) -> int | bool | str:
    kind = FIELDS[field]
    if kind is int:
        if not re.fullmatch(r"[0-9]{1,9}", value):
            rule = f"rule `{shortened(text)}`: `{shortened(value)}` is not a whole number"
            raise SpecError(rule, f"`{text.partition('.')[0]}.{field}=4`, for example")
        return int(value)
    if kind is bool:
        if value.lower() not in _TRUTH:
            rule = f"rule `{shortened(text)}`: `{shortened(value)}` is not true or false"
            raise SpecError(rule, f"`{text.partition('.')[0]}.{field}=true`, for example")
        return _TRUTH[value.lower()]
    if comparison not in ("=", "==", "!="):
        rule = f"rule `{shortened(text)}`: {field} can only be compared with = and !="
        raise SpecError(rule, f"`{text.partition('.')[0]}.{field}={shortened(value)}`, for example")
    if kind is not str and value not in list(kind):  # type: ignore[call-overload]
        legal = [str(v) for v in kind]  # type: ignore[attr-defined]
        rule = f"rule `{shortened(text)}`: {field} cannot be `{shortened(value)}`"
        raise SpecError(rule, nearest(value, legal))
    return value


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The user's bounds on the space. max_memory_gib bounds every GPU below its capacity (0: no further bound).
    same_mesh: groups of calls that must share their mesh."""

    pins: tuple[Rule, ...] = ()
    forbids: tuple[Rule, ...] = ()
    same_mesh: tuple[tuple[str, ...], ...] = ()
    max_memory_gib: float = 0.0

    @property
    def words(self) -> list[str]:
        """The rules as options of the command line."""
        found = [f"--pin {rule.text}" for rule in self.pins] + [f"--forbid {rule.text}" for rule in self.forbids]
        found += [f"--same-mesh {','.join(group)}" for group in self.same_mesh]
        return found + ([f"--max-memory {self.max_memory_gib:g}GiB"] if self.max_memory_gib else [])

    def with_earlier(self, earlier: Limits) -> Limits:
        """These limits and those of an earlier search; of two bounds on memory this one."""
        return Limits(
            pins=self.pins + earlier.pins,
            forbids=self.forbids + earlier.forbids,
            same_mesh=self.same_mesh + earlier.same_mesh,
            max_memory_gib=self.max_memory_gib or earlier.max_memory_gib,
        )

    def refuses(self, call: str, mesh: DeviceMesh, strategy: ParallelStrategy, cluster: ClusterSpec) -> str:
        """The rule that a layout of a call breaks, empty when none."""
        for rule in self.pins:
            if rule.call in ("*", call) and not rule.holds(mesh, strategy, cluster):
                return f"pinned: {rule.text}"
        for rule in self.forbids:
            if rule.call in ("*", call) and rule.holds(mesh, strategy, cluster):
                return f"forbidden: {rule.text}"
        return ""


def parse_limits(
    pins: Sequence[str], forbids: Sequence[str], same_mesh: Sequence[str], max_memory: str, calls: Sequence[str]
) -> Limits:
    """The limits of a command line; `same_mesh` are comma-separated names of calls."""
    groups = tuple(tuple(name.strip() for name in group.split(",")) for group in same_mesh)
    for group in groups:
        for name in group:
            if name not in calls:
                raise SpecError(f"--same-mesh: no call `{shortened(name)}`", nearest(name, list(calls)))
        if len(group) < 2:
            raise SpecError(f"--same-mesh `{group[0]}` names one call", "two or more names, joined by commas")
    return Limits(
        pins=tuple(parse_rule(text, calls) for text in pins),
        forbids=tuple(parse_rule(text, calls) for text in forbids),
        same_mesh=groups,
        max_memory_gib=_gib(max_memory),
    )


def _gib(text: str) -> float:
    if not text:
        return 0.0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB)?", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise SpecError(f"--max-memory `{shortened(text)}` is not a size", "for example 72GiB")
    return float(match[1]) * (1e9 / GIB if (match[2] or "").lower() == "gb" else 1.0)
