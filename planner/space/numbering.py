"""Number priced layouts: the `SearchProblem` that the solvers see, which knows nothing of models and GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cost_models.engines.machine import Machine
from cost_models.reallocation import reallocation_matrix
from planner.search.problem import Dependency, Moves, Options, SearchProblem
from planner.space.layouts import Placement
from plans.cluster import ClusterSpec
from plans.graph import Edge
from plans.layout import Layout, held_slices
from plans.model import ModelSpec
from plans.workload import Workload


def problem_of(
    workload: Workload,
    machine: Machine,
    capacity_bytes: float,
    layouts: Mapping[str, Sequence[Placement]],
    options: Mapping[str, Options],
    same_mesh: Sequence[Sequence[str]] = (),
) -> SearchProblem:
    """The problem of choosing among some layouts of every call, of which `options` are the figures.

    Both are by call, in graph order; same_mesh: groups of calls that must share a mesh. capacity_bytes: of one GPU.
    """
    free = free_problem(workload, machine.cluster, capacity_bytes, layouts, options, same_mesh)
    return moving(free, workload, machine, layouts)


def free_problem(
    workload: Workload,
    cluster: ClusterSpec,
    capacity_bytes: float,
    layouts: Mapping[str, Sequence[Placement]],
    options: Mapping[str, Options],
    same_mesh: Sequence[Sequence[str]] = (),
) -> SearchProblem:
    """What `problem_of` gives, but reallocations take no time."""
    names, slices = tuple(layouts), dict[object, int]()
    numbered = []
    for name in names:
        spec = workload.spec(name)
        ids = [slices.setdefault(held_slices(spec, strategy), len(slices)) for _, strategy in layouts[name]]
        numbered.append(replace(options[name], layout=np.array(ids)))
    return SearchProblem(
        gpus=cluster.size,
        capacity_bytes=capacity_bytes,
        names=names,
        options=tuple(numbered),
        edges=_dependencies(names, workload.graph.model_edges),
        turns=_dependencies(names, workload.graph.version_ends),
        moves={(u, v): Moves.free(len(numbered[u]), len(numbered[v])) for u, v in _readers(workload, names)},
        same_mesh=tuple(tuple(names.index(call) for call in group) for group in _joined(same_mesh)),
    )


def moving(
    problem: SearchProblem, workload: Workload, machine: Machine, layouts: Mapping[str, Sequence[Placement]]
) -> SearchProblem:
    """A problem with the reallocation times of its layouts, from every option of a trainer to every option of its
    model's other calls."""
    moves = {}
    for u, v in problem.moves:
        trainer, name = problem.names[u], problem.names[v]
        source, row = _distinct(workload.spec(trainer), layouts[trainer], machine.cluster)
        target, column = _distinct(workload.spec(name), layouts[name], machine.cluster)
        moves[u, v] = Moves(reallocation_matrix(machine, source, target), row, column)
    return replace(problem, moves=moves)


def options_of(entries: Sequence[Placement], cluster: ClusterSpec, price: NDArray[np.float64]) -> Options:
    """The figures of some layouts of one call; `problem_of` numbers the layouts. price: [entries, 4] seconds, resident,
    transient and shared bytes."""
    return Options(
        first=np.array([mesh.ranks(cluster).start for mesh, _ in entries]),
        width=np.array([mesh.size for mesh, _ in entries]),
        time_s=price[:, 0],
        resident_bytes=price[:, 1],
        transient_bytes=price[:, 2],
        layout=np.zeros(len(entries), np.int64),
        copy_bytes=price[:, 3],
    )


def _joined(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """Groups of calls, those that have a call in common made one."""
    joined: list[list[str]] = []
    for group in groups:
        apart = [other for other in joined if not set(other) & set(group)]
        met = [call for other in joined if set(other) & set(group) for call in other]
        joined = [*apart, list(dict.fromkeys([*met, *group]))]
    return joined


def _dependencies(names: tuple[str, ...], edges: Sequence[Edge]) -> tuple[Dependency, ...]:
    at = {name: i for i, name in enumerate(names)}
    return tuple(Dependency(at[e.source], at[e.target], e.distance) for e in edges)


def _readers(workload: Workload, names: tuple[str, ...]) -> list[tuple[int, int]]:
    """Every trainer with each of its model's other calls."""
    return [
        (names.index(trainer), v)
        for role, trainer in workload.graph.trainers.items()
        for v, name in enumerate(names)
        if name != trainer and workload.graph.call(name).model == role
    ]


def _distinct(
    spec: ModelSpec, entries: Sequence[Placement], cluster: ClusterSpec
) -> tuple[list[Layout], NDArray[np.intp]]:
    """The different layouts of some options, and which one each option has. Ranks of cp hold what ranks of dp hold."""
    numbers: dict[object, int] = {}
    layouts: list[Layout] = []
    index = []
    for mesh, strategy in entries:
        key = (mesh, held_slices(spec, strategy))
        if key not in numbers:
            numbers[key] = len(layouts)
            held = replace(strategy, dp=strategy.dp * strategy.cp, cp=1) if strategy.cp > 1 else strategy
            layouts.append(Layout.of(spec, mesh, held, cluster))
        index.append(numbers[key])
    return layouts, np.array(index, dtype=np.intp)
