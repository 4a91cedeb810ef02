"""What the user's rules leave of a call's layouts, and which rule it is when they leave nothing.

A pin may name a value that the space would not try, such as a number of micro-batches that is no power of two: the
layouts get it where the rules of `plans.checks` allow it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from planner.space.layouts import Layouts, Pruned, Shape, positions, shapes
from planner.space.limits import Limits, Rule
from plans.checks import CALL_CHECKS
from plans.cluster import ClusterSpec, DeviceMesh, check_mesh, parse_mesh
from plans.errors import Infeasible, RealplanError, SpecError
from plans.plan import ExecutionPlan, PlannedCall
from plans.problems import shortened
from plans.strategy import SETTINGS, ParallelStrategy
from plans.workload import Workload

DEGREES = ("dp", "tp", "pp", "cp", "ep")
"""Fields of which the space has every legal value."""
SAMPLE = 50
"""Layouts that a rule is tried on to learn why none has it."""
SHOWN = 12
"""Legal values that a hint names."""


def shapes_for(call: str, cluster: ClusterSpec, limits: Limits) -> list[Shape]:
    """Mesh shapes to try, with those that a pin of the call names."""
    tried = shapes(cluster)
    for mesh in _pinned_meshes(call, cluster, limits):
        shape = Shape(mesh.gpus, mesh.nodes)
        tried += [shape] if shape not in tried else []
    return tried


def positions_for(call: str, shape: Shape, cluster: ClusterSpec, limits: Limits) -> list[DeviceMesh]:
    """Where a shape is tried, with the places that a pin of the call names."""
    tried = positions(shape, cluster)
    pinned = [mesh for mesh in _pinned_meshes(call, cluster, limits) if Shape(mesh.gpus, mesh.nodes) == shape]
    return [*tried, *(mesh for mesh in pinned if mesh not in tried)]


def _pinned_meshes(call: str, cluster: ClusterSpec, limits: Limits) -> Iterator[DeviceMesh]:
    """Meshes of the pins on mesh, size and first node that exist on the cluster."""
    whole, per_node = cluster.whole, cluster.gpus_per_node
    for rule in limits.pins:
        if rule.call not in ("*", call) or rule.comparison not in ("=", "==") or isinstance(rule.value, bool):
            continue
        try:
            if rule.field == "mesh":
                yield parse_mesh(str(rule.value), cluster)
            elif rule.field == "gpus" and int(rule.value) % per_node == 0:
                yield _legal(replace(whole, nodes=int(rule.value) // per_node), cluster)
            elif rule.field == "nodes":
                yield _legal(replace(whole, nodes=int(rule.value)), cluster)
            elif rule.field == "first_node":
                for shape in shapes(cluster):
                    starts = range(0, per_node, shape.gpus)
                    yield from (_legal(shape.at(int(rule.value), gpu), cluster) for gpu in starts)
        except SpecError:  # `why_none` says so, where the rules leave nothing
            continue


def _legal(mesh: DeviceMesh, cluster: ClusterSpec) -> DeviceMesh:
    if not mesh.nodes:
        raise SpecError("a mesh has a node")
    check_mesh(mesh, cluster)
    return mesh


def with_pinned(call: str, found: Layouts, workload: Workload, cluster: ClusterSpec, limits: Limits) -> Layouts:
    """The layouts, and legal ones that have the settings that pins of the call name."""
    wanted = {
        rule.field: rule.value
        for rule in limits.pins
        if rule.call in ("*", call) and rule.comparison in ("=", "==") and rule.field in SETTINGS
    }
    settings = {name: value for name, value in wanted.items() if name not in DEGREES}
    if not settings:
        return found
    if "micro_batch_tokens" in settings:
        settings = {"micro_batches": 1, **settings}
    kept = dict.fromkeys(found)
    for shape, strategy in found:
        changed = _with(strategy, settings)
        if changed is not None and (shape, changed) not in kept and not _problem(call, shape.at(0), changed,
                                                                                 workload, cluster):  # fmt: skip
            kept[shape, changed] = None
    return list(kept)


def _with(strategy: ParallelStrategy, settings: dict[str, int | bool | str]) -> ParallelStrategy | None:
    try:
        return replace(strategy, **{name: SETTINGS[name].type(value) for name, value in settings.items()})
    except RealplanError:
        return None


def _problem(
    call: str, mesh: DeviceMesh, strategy: ParallelStrategy, workload: Workload, cluster: ClusterSpec, *skip: str
) -> tuple[str, str]:
    """Message and hint of the first rule of `plans.checks` that a layout breaks, without those to skip; or none."""
    planned = PlannedCall(call=call, mesh=mesh, strategy=strategy)
    plan = ExecutionPlan(workload=workload, cluster=cluster, calls=(planned,))
    for check in CALL_CHECKS:
        for problem in check(plan, planned, workload.spec(call)):
            if problem.rule not in skip:
                return problem.message, problem.hint
    return ()  # type: ignore[return-value]


def allowed(call: str, found: Layouts, cluster: ClusterSpec, limits: Limits, pruned: Pruned) -> Layouts:
    """The layouts that the rules allow somewhere."""
    if not limits.pins and not limits.forbids:
        return found
    places = {shape: positions_for(call, shape, cluster, limits) for shape, _ in found}
    kept = []
    for shape, strategy in found:
        broken = [limits.refuses(call, mesh, strategy, cluster) for mesh in places[shape]]
        if all(broken):
            pruned.note(broken[0])
        else:
            kept.append((shape, strategy))
    return kept


def why_none(call: str, found: Layouts, workload: Workload, cluster: ClusterSpec, limits: Limits) -> Infeasible:
    """The rule that leaves no layout of a call, why, and the values that it could have."""
    rules = [(rule, True) for rule in limits.pins if rule.call in ("*", call)]
    rules += [(rule, False) for rule in limits.forbids if rule.call in ("*", call)]
    every = [(mesh, s) for shape, s in found for mesh in positions_for(call, shape, cluster, limits)]
    left, kept = every, list[str]()
    for rule, pinned in rules:
        said = f"{'--pin' if pinned else '--forbid'} {shortened(rule.text)}"
        alone = [pair for pair in every if rule.holds(*pair, cluster) is pinned]
        rest = [pair for pair in left if rule.holds(*pair, cluster) is pinned]
        if not rest:
            among = left if alone else every
            beside = f" beside {', '.join(kept)}" if alone and kept else ""
            reason, hint = _why(call, rule, among, workload, cluster) if pinned and not alone else ("", "")
            legal = dict.fromkeys(rule.value_of(*pair, cluster) for pair in among)
            values = _listed(sorted(legal, key=lambda value: (str(type(value)), value)))
            reason = reason or f"no layout of `{call}` has it" if pinned else f"every layout of `{call}` has it"
            more = [hint] if hint and not hint.startswith(rule.field) else []
            more += [f"or drop {kept[-1]}"] if beside else []
            hint = "; ".join([f"{rule.field} one of {values}{beside}", *more])
            return Infeasible(f"{said}{beside}: {reason}", hint)
        left, kept = rest, [*kept, said]
    return Infeasible(f"no layout of `{call}` keeps the rules {', '.join(kept)}", "drop a --pin or a --forbid")


def _listed(values: Sequence[object]) -> str:
    words = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    return ", ".join(words[:SHOWN]) + (", ..." if len(words) > SHOWN else "")


def _why(
    call: str,
    rule: Rule,
    among: Sequence[tuple[DeviceMesh, ParallelStrategy]],
    workload: Workload,
    cluster: ClusterSpec,
) -> tuple[str, str]:
    """What `check` would say of a layout that a pin asks for, empty where it would say nothing."""
    if rule.comparison not in ("=", "==") or not among:
        return "", ""
    try:
        if rule.field == "mesh":
            parse_mesh(str(rule.value), cluster)
        elif rule.field in ("gpus", "nodes", "first_node"):
            _check_size(rule.field, int(rule.value), cluster)
        else:
            largest = sorted(among, key=lambda pair: -pair[0].size)  # they break the fewest rules
            for mesh, strategy in largest[:: max(1, len(among) // SAMPLE)]:
                changed = replace(strategy, **{rule.field: SETTINGS[rule.field].type(rule.value)})
                if said := _problem(call, mesh, changed, workload, cluster, "mesh-size"):
                    return said
    except SpecError as error:
        return error.message, error.hint
    return "", ""


def _check_size(field: str, value: int, cluster: ClusterSpec) -> None:
    """Raise the rule of meshes that a pin on their size or place breaks."""
    per_node = cluster.gpus_per_node
    if field == "first_node":
        check_mesh(DeviceMesh(first_node=value, nodes=1, first_gpu=0, gpus=per_node), cluster)
    elif field == "nodes":
        check_mesh(DeviceMesh(first_node=0, nodes=value, first_gpu=0, gpus=per_node), cluster)
    elif value < per_node:
        check_mesh(DeviceMesh(first_node=0, nodes=1, first_gpu=0, gpus=value), cluster)
    elif value % per_node:
        nodes = value // per_node
        legal = f"gpus {nodes * per_node} or {(nodes + 1) * per_node}"
        raise SpecError(f"{value} GPUs are not whole nodes of {per_node}", legal)
    else:
        check_mesh(DeviceMesh(first_node=0, nodes=value // per_node, first_gpu=0, gpus=per_node), cluster)
