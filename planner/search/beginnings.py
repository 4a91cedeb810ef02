"""Where searches begin: the fastest options of all calls, or random ones, with calls on one mesh where they must."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planner.search.problem import Decision, IntArray, SearchProblem


def _groups(problem: SearchProblem) -> list[tuple[int, ...]]:
    """Calls that must share a mesh, every other call by itself."""
    return [
        tuple(c for c in range(problem.n_calls) if problem.leader[c] == leader)
        for leader in dict.fromkeys(problem.leader)
    ]


def _by_mesh(problem: SearchProblem, group: tuple[int, ...]) -> list[list[IntArray]]:
    """For every mesh that all calls of a group have, the options of each call on it."""
    mesh = [problem.options[c].first * (problem.gpus + 1) + problem.options[c].width for c in group]
    common = set(mesh[0].tolist()).intersection(*(m.tolist() for m in mesh))
    return [[np.flatnonzero(m == wanted) for m in mesh] for wanted in sorted(common)]


def fastest(problem: SearchProblem) -> Decision | None:
    """Every call's fastest option; None where calls that must share a mesh have none in common."""
    choice = [int(options.time_s.argmin()) for options in problem.options]
    for group in _groups(problem):
        if len(group) == 1:
            continue
        best = np.inf
        for options in _by_mesh(problem, group):
            picked = [int(o[problem.options[c].time_s[o].argmin()]) for c, o in zip(group, options, strict=True)]
            total = sum(float(problem.options[c].time_s[i]) for c, i in zip(group, picked, strict=True))
            if total < best:
                best = total
                for c, i in zip(group, picked, strict=True):
                    choice[c] = i
        if best == np.inf:
            return None
    return problem.plain(tuple(choice))


def anywhere(problem: SearchProblem, draw: Callable[[int], int]) -> list[int]:
    """A random option of every call; `draw(bound)` gives a number in [0, bound)."""
    choice = [draw(len(options)) for options in problem.options]
    for group in _groups(problem):
        if len(group) == 1:
            continue
        meshes = _by_mesh(problem, group)
        for c, options in zip(group, meshes[draw(len(meshes))], strict=True):
            choice[c] = int(options[draw(len(options))])
    return choice
