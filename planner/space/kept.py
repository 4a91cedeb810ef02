"""The limits of an earlier search, for another one on a cluster that may have lost devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from planner.space.limits import Limits, Rule, parse_limits
from planner.space.pins import DEGREES
from plans.cluster import ClusterSpec, parse_mesh
from plans.errors import SpecError
from plans.plan import ExecutionPlan

_OPTIONS = ("--pin", "--forbid", "--same-mesh", "--max-memory")


def kept_limits(
    path: Path, plan: ExecutionPlan, calls: Sequence[str], cluster: ClusterSpec
) -> tuple[Limits, list[str]]:
    """The limits that a plan was searched under, and in words the pins that are left out because no device of the
    cluster can meet them. Raises SpecError for words that are no limits."""
    given: dict[str, list[str]] = {option: [] for option in _OPTIONS}
    for words in plan.limits:
        option, _, value = words.partition(" ")
        if option not in given:
            raise SpecError(f"{path}: provenance.search.limits: `{words}` is no limit", f"one of {', '.join(_OPTIONS)}")
        given[option].append(value)
    found = parse_limits(given["--pin"], given["--forbid"], given["--same-mesh"], "".join(given["--max-memory"]), calls)
    rules = {rule.text: _on(rule, cluster) for rule in found.pins}
    pins = tuple(rule for rule in rules.values() if rule is not None)
    return replace(found, pins=pins), [f"--pin {text}" for text, rule in rules.items() if rule is None]


def _on(rule: Rule, cluster: ClusterSpec) -> Rule | None:
    """A pin on a cluster, where a mesh may be spelt otherwise; None where it asks for devices that are not there."""
    if rule.field == "mesh":
        try:
            return replace(rule, value=parse_mesh(str(rule.value), cluster).text(cluster))
        except SpecError:
            return None if rule.comparison != "!=" else rule
    most = {"nodes": cluster.nodes, "first_node": cluster.nodes - 1, "gpus": cluster.size}
    most |= dict.fromkeys(DEGREES, cluster.size)
    if rule.field not in most:
        return rule
    least = 0 if rule.field == "first_node" else 1
    return rule if any(rule.compares(value) for value in range(least, most[rule.field] + 1)) else None
