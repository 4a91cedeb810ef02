"""Options that no optimal plan needs: another option of the same call is at least as good in everything that counts.

Option p dominates o when p's mesh lies inside o's (or is the same), p takes no more time, resident and transient bytes,
and no reallocation to or from any option of a partner call takes longer with p. Replacing o by p then delays nothing in
`planner.search.schedule` (ends are monotone in durations and in the nodes waited for) and fills no GPU further, so the
best of the remaining plans is as good as the best of all. Sharing a copy counts for o, never for p; an option that may
share the copy of another consumer stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.search.problem import Decision, FloatArray, IntArray, Options, SearchProblem
from planner.search.relaxation import may_share


@dataclass(frozen=True, eq=False)
class Filtered:
    """A smaller problem; `keep[call]` are the indices that its options had. `counts`: reason -> options dropped."""

    problem: SearchProblem
    keep: tuple[IntArray, ...]
    counts: dict[str, int]

    def original(self, choice: tuple[int, ...]) -> tuple[int, ...]:
        """A choice of the smaller problem in the numbers of the original."""
        return tuple(int(kept[i]) for kept, i in zip(self.keep, choice, strict=True))

    def whole(self, decision: Decision) -> Decision:
        """A decision of the smaller problem in the numbers of the original."""
        return Decision(self.original(decision.choice), decision.order, decision.lag)

    def begin(self, start: Decision) -> Decision | None:
        """A decision of the original in the smaller problem's numbers; None where one of its options was dropped."""
        at = [int(np.searchsorted(kept, i)) for kept, i in zip(self.keep, start.choice, strict=True)]
        same = all(k < len(kept) and kept[k] == i for kept, k, i in zip(self.keep, at, start.choice, strict=True))
        return Decision(tuple(at), start.order, start.lag) if same else None

    def narrowed(self, keep: tuple[IntArray, ...], reason: str) -> Filtered:
        """Only the options `keep` of the smaller problem."""
        dropped = sum(len(options) - len(kept) for options, kept in zip(self.problem.options, keep, strict=True))
        original = tuple(before[kept] for before, kept in zip(self.keep, keep, strict=True))
        return Filtered(self.problem.restrict(keep), original, {**self.counts, reason: dropped})


def _mesh(problem: SearchProblem, options: Options) -> IntArray:
    """One number per mesh."""
    return np.asarray(options.first * (problem.gpus + 1) + options.width)


def _mesh_key(problem: SearchProblem, options: Options) -> IntArray:
    """One number per (mesh, layout)."""
    highest = max(int(o.layout.max()) for o in problem.options) + 1
    return _mesh(problem, options) * highest + options.layout


def _move_columns(problem: SearchProblem, call: int) -> FloatArray:
    """[n_options, partner options]: reallocation seconds with every option of every partner."""
    blocks = [np.zeros((len(problem.options[call]), 0))]
    for (u, v), moves in problem.moves.items():
        if call == v:
            blocks.append(np.unique(moves.seconds[np.unique(moves.row)], axis=0).T[moves.column])
        if call == u:
            blocks.append(np.unique(moves.seconds[:, np.unique(moves.column)], axis=1)[moves.row])
    return np.ascontiguousarray(np.concatenate(blocks, axis=1))


def _may_share(problem: SearchProblem, call: int) -> IntArray:
    """Options of `call` that can share a copy and save by it: as consumer their own bytes, as trainer a consumer's."""
    key = _mesh_key(problem, problem.options[call])
    shares = np.zeros(len(key), bool)
    for u, v in problem.moves:
        if call not in (u, v):
            continue
        other = problem.options[u if call == v else v]
        saves = problem.options[v].shared_bytes > 0
        if call == v:
            shares |= saves & np.isin(key, _mesh_key(problem, other))
        else:
            shares |= np.isin(key, _mesh_key(problem, other)[saves])
    return np.flatnonzero(shares)


def undominated(problem: SearchProblem, call: int) -> IntArray:
    """Indices of the options of `call` that no other dominates; of equals the first."""
    options, moves = problem.options[call], _move_columns(problem, call)
    first, end = options.first, options.first + options.width
    least = options.transient_bytes.copy()  # what the option needs at best
    shares = _may_share(problem, call)
    least[shares] -= options.shared_bytes[shares]
    is_trainer = any(call == u for u, _ in problem.moves)
    protected = set(map(int, shares)) if is_trainer else set()
    if call in problem.trainer:
        protected |= set(np.flatnonzero(may_share(problem, call)).tolist())
    grouped = problem.leader.count(problem.leader[call]) > 1
    kept = np.ones(len(options), bool)
    for o in range(len(options)):
        rivals = (first >= first[o]) & (end <= end[o]) & (options.time_s <= options.time_s[o]) & kept
        rivals &= (options.resident_bytes <= options.resident_bytes[o]) & (options.transient_bytes <= least[o])
        rivals[o] = False
        if grouped:
            rivals &= (first == first[o]) & (end == end[o])
        found = np.flatnonzero(rivals)
        if o in protected or not len(found):
            continue
        if bool((moves[found] <= moves[o]).all(axis=1).any()):
            kept[o] = False
    return np.flatnonzero(kept)


def overweight(problem: SearchProblem, call: int) -> IntArray:
    """Indices of the options of `call` that exceed a GPU's memory alone."""
    options = problem.options[call]
    least = options.resident_bytes + options.transient_bytes - options.shared_bytes
    return np.flatnonzero(least > problem.capacity_bytes)


def stray(problem: SearchProblem, call: int) -> IntArray:
    """Indices of the options of `call` on meshes that a call which must share its mesh has not."""
    options, kept = problem.options[call], np.ones(len(problem.options[call]), bool)
    for other in range(problem.n_calls):
        if problem.leader[other] == problem.leader[call]:
            has = problem.options[other]
            kept &= np.isin(_mesh(problem, options), _mesh(problem, has))
    return np.flatnonzero(~kept)


def light(problem: SearchProblem) -> Filtered | None:
    """Drop what cannot fit, then what cannot share its mesh as asked; None where that leaves a call nothing."""
    left = Filtered(problem, tuple(np.arange(len(options)) for options in problem.options), {})
    for reason, useless in (("exceeds a GPU's memory alone", overweight), ("a call must share its mesh", stray)):
        dropped = [useless(left.problem, call) for call in range(problem.n_calls)]
        keep = tuple(np.setdiff1d(np.arange(len(o)), d) for o, d in zip(left.problem.options, dropped, strict=True))
        if not all(map(len, keep)):
            return None
        left = left.narrowed(keep, reason) if any(map(len, dropped)) else left
    return left


def filtered(problem: SearchProblem) -> Filtered | None:
    """Drop what cannot fit, then what is dominated; None where a call has no option that fits alone."""
    lighter = light(problem)
    if lighter is None:
        return None
    keep = tuple(undominated(lighter.problem, call) for call in range(problem.n_calls))
    return lighter.narrowed(keep, "another option is as good in time, memory, mesh and reallocation")
