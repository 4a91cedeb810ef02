"""A plan search with everything but numbers taken out: numbered calls, numbered options, seconds and bytes.

The solvers know nothing of models or GPUs. A *decision* gives every call one of its options, an order and a lag; what a
decision costs is defined in `planner.search.schedule`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from plans.graph import least_lags

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

MAX_CALLS = 30  # calls of a mesh are the bits of one integer


def _frozen(values: object, dtype: type[np.generic]) -> NDArray[np.generic]:
    """An array that nobody changes by accident; the values themselves where they are one of the type, because matrices
    of large clusters fill the memory."""
    array: NDArray[np.generic] = np.asarray(values, dtype=dtype)
    array.setflags(write=False)
    return array


@dataclass(frozen=True, eq=False, kw_only=True)
class Options:
    """The candidates of one call, as columns of length n_options.

    first, width: the mesh as an interval of the GPU axis. time_s: duration of the call. resident_bytes: lives on each
    GPU of the mesh all the time. transient_bytes: lives on each of them while the call runs. layout: equal ids mean the
    same weights on the same ranks of the mesh. copy_bytes: what a consumer saves of its transient bytes when it shares
    the copy of its trainer (same mesh and layout).
    """

    first: IntArray
    width: IntArray
    time_s: FloatArray
    resident_bytes: FloatArray
    transient_bytes: FloatArray
    layout: IntArray
    copy_bytes: FloatArray | None = None

    def __post_init__(self) -> None:
        if self.copy_bytes is None:
            object.__setattr__(self, "copy_bytes", np.zeros(len(self.first)))
        for name in ("first", "width", "layout"):
            object.__setattr__(self, name, _frozen(getattr(self, name), np.int64))
        for name in ("time_s", "resident_bytes", "transient_bytes", "copy_bytes"):
            object.__setattr__(self, name, _frozen(getattr(self, name), np.float64))
        columns = (self.first, self.width, self.time_s, self.resident_bytes, self.transient_bytes, self.layout)
        assert len(self.first) > 0, "a call needs at least one option"
        assert all(column.shape == self.first.shape for column in (*columns, self.shared_bytes)), "uneven columns"
        assert (self.first >= 0).all() and (self.width > 0).all() and (self.layout >= 0).all()
        assert np.isfinite(self.time_s).all() and (self.time_s > 0).all(), "every option takes time"
        assert (self.resident_bytes >= 0).all() and (self.transient_bytes >= self.shared_bytes).all()

    def __len__(self) -> int:
        return len(self.first)

    @property
    def shared_bytes(self) -> FloatArray:
        """`copy_bytes`, never None."""
        assert self.copy_bytes is not None
        return self.copy_bytes

    def take(self, keep: IntArray) -> Options:
        """The options at the indices `keep`, in that order."""
        columns = ("first", "width", "time_s", "resident_bytes", "transient_bytes", "layout", "copy_bytes")
        return Options(**{name: getattr(self, name)[keep] for name in columns})


@dataclass(frozen=True, slots=True)
class Dependency:
    """Call `target` of iteration t starts no sooner than `source` of iteration t - `distance` ends. The transfer of a
    batch between them is left out: it is less than 0.01 % of a period."""

    source: int
    target: int
    distance: int = 0


@dataclass(frozen=True, eq=False)
class Moves:
    """Reallocation seconds from every option of a trainer to every option of a consumer, zero where the consumer can
    use the trainer's own copy.

    Options that hold the same slices on the same mesh move in the same time: seconds [source layouts, target layouts]
    is held once for each pair of layouts. row, column: the layout of every option of the trainer and of the consumer.
    On 1,024 GPUs that is 50 MB where a matrix of options has 1.6 GB.
    """

    seconds: FloatArray
    row: IntArray
    column: IntArray

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", _frozen(self.seconds, np.float64))
        object.__setattr__(self, "row", _frozen(self.row, np.int64))
        object.__setattr__(self, "column", _frozen(self.column, np.int64))
        assert (self.seconds >= 0).all() and np.isfinite(self.seconds).all()
        for index, count in zip((self.row, self.column), self.seconds.shape, strict=True):
            assert len(index) and index.min() >= 0 and index.max() < count, "an option has no layout"

    @classmethod
    def of_options(cls, seconds: FloatArray) -> Moves:
        """From a matrix [options of the trainer, options of the consumer]."""
        rows, columns = np.shape(seconds)
        return cls(seconds, np.arange(rows), np.arange(columns))

    @classmethod
    def free(cls, sources: int, targets: int) -> Moves:
        """No time between any of so many options."""
        return cls(np.zeros((1, 1)), np.zeros(sources, np.int64), np.zeros(targets, np.int64))

    @property
    def shape(self) -> tuple[int, int]:
        """Options of the trainer, options of the consumer."""
        return len(self.row), len(self.column)

    def between(self, sources: IntArray, targets: IntArray) -> FloatArray:
        """Seconds [sources, targets] between some options."""
        part: FloatArray = self.seconds[np.ix_(self.row[sources], self.column[targets])]
        return part

    def take(self, sources: IntArray, targets: IntArray) -> Moves:
        """Only some options, with the layouts that they have."""
        rows, row = np.unique(self.row[sources], return_inverse=True)
        columns, column = np.unique(self.column[targets], return_inverse=True)
        whole = (len(rows), len(columns)) == self.seconds.shape
        seconds = self.seconds if whole else self.seconds[np.ix_(rows, columns)]
        return Moves(seconds, row.reshape(-1), column.reshape(-1))

    def least_into(self) -> FloatArray:
        """Least seconds to every option of the consumer, [options of the consumer]."""
        rows = np.unique(self.row)
        seconds = self.seconds if len(rows) == len(self.seconds) else self.seconds[rows]
        least: FloatArray = seconds.min(axis=0)[self.column]
        return least


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchProblem:
    """Calls in graph order with their options, dependencies and reallocation times.

    moves: (trainer u, consumer v) -> seconds between their options. A consumer has one trainer, and a dependency on it
    that says whose version it reads; consumers of one version that hold it in the same way share a copy.
    same_mesh: groups of calls that must have one mesh. turns: orders in which nobody waits: `source` of iteration
    t - distance (0 or less) takes its weights, and may run on, before `target` of iteration t makes newer ones.
    """

    gpus: int
    capacity_bytes: float
    names: tuple[str, ...]
    options: tuple[Options, ...]
    edges: tuple[Dependency, ...]
    moves: Mapping[tuple[int, int], Moves] = field(default_factory=lambda: MappingProxyType({}))
    same_mesh: tuple[tuple[int, ...], ...] = ()
    turns: tuple[Dependency, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.names)
        assert 0 < n <= MAX_CALLS and len(self.options) == n and len(set(self.names)) == n
        for options in self.options:
            assert (options.first + options.width <= self.gpus).all(), "a mesh ends outside the cluster"
        for edge in self.edges:
            assert 0 <= edge.source < n and 0 <= edge.target < n and edge.distance >= 0
            assert edge.distance > 0 or edge.source < edge.target, "calls are not in graph order"
        for turn in self.turns:
            assert 0 <= turn.source < n and 0 <= turn.target < n and turn.distance <= 0
        consumers = [v for _, v in self.moves]
        assert len(set(consumers)) == len(consumers), "a call reads the weights of two trainers"
        for (u, v), moves in self.moves.items():
            assert moves.shape == (len(self.options[u]), len(self.options[v])) and u != v
            assert any((e.source, e.target) == (u, v) and e.distance > 0 for e in self.edges), "a move needs a version"
        grouped = [call for group in self.same_mesh for call in group]
        assert len(set(grouped)) == len(grouped) and all(0 <= call < n for call in grouped), "a call in two groups"

    @property
    def n_calls(self) -> int:
        """Calls of one iteration."""
        return len(self.names)

    @cached_property
    def trainer(self) -> dict[int, int]:
        """Consumer -> the call whose weights it reads."""
        return {v: u for u, v in self.moves}

    @cached_property
    def version(self) -> dict[int, int]:
        """Consumer -> how many iterations old the weights are that it reads."""
        return {
            v: min(e.distance for e in self.edges if (e.source, e.target) == (u, v) and e.distance > 0)
            for u, v in self.moves
        }

    @cached_property
    def earlier_readers(self) -> dict[int, tuple[int, ...]]:
        """Consumer -> the other consumers of the same version that may come before it in an iteration, and whose copy
        it then shares where it has their mesh and layout."""
        after: dict[int, set[int]] = {c: set() for c in range(self.n_calls)}
        for c in reversed(range(self.n_calls)):  # graph order: edges of distance 0 lead to later calls
            for e in self.edges:
                if e.source == c and e.distance == 0:
                    after[c] |= {e.target, *after[e.target]}
        version, trainer = self.version, self.trainer
        return {
            v: tuple(
                w for w in trainer if w != v and trainer[w] == u and version[w] == version[v] and w not in after[v]
            )
            for v, u in trainer.items()
        }

    @cached_property
    def most_lag(self) -> int:
        """The largest lag that a decision may have: one more than calls must run apart."""
        return 1 - min((turn.distance for turn in self.turns), default=0)

    @cached_property
    def first_lags(self) -> tuple[int, ...]:
        """The least lags in graph order."""
        edges = ((e.source, e.target, e.distance) for e in (*self.edges, *self.turns))
        return tuple(least_lags(range(self.n_calls), edges).values())

    def plain(self, choice: tuple[int, ...]) -> Decision:
        """Options in graph order with the least lags, which is always legal."""
        return Decision(choice, tuple(range(self.n_calls)), self.first_lags)

    @cached_property
    def leader(self) -> tuple[int, ...]:
        """For each call the first one of those that must have its mesh (most often itself)."""
        group_of = {call: group for group in self.same_mesh for call in group}
        return tuple(min(group_of.get(call, (call,))) for call in range(self.n_calls))

    def mesh(self, call: int, option: int) -> tuple[int, int]:
        """First GPU and width of an option."""
        return int(self.options[call].first[option]), int(self.options[call].width[option])

    def keeps_meshes(self, choice: tuple[int, ...]) -> bool:
        """Whether calls that must share a mesh do."""
        return all(self.mesh(c, choice[c]) == self.mesh(u, choice[u]) for c, u in enumerate(self.leader))

    def restrict(self, keep: tuple[IntArray, ...]) -> SearchProblem:
        """The problem with only the options `keep[call]` of every call, renumbered."""
        return SearchProblem(
            gpus=self.gpus,
            capacity_bytes=self.capacity_bytes,
            names=self.names,
            options=tuple(options.take(kept) for options, kept in zip(self.options, keep, strict=True)),
            edges=self.edges,
            moves={(u, v): moves.take(keep[u], keep[v]) for (u, v), moves in self.moves.items()},
            same_mesh=self.same_mesh,
            turns=self.turns,
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """One plan: option index per call, the order of the calls in a period, and the lag of each call."""

    choice: tuple[int, ...]
    order: tuple[int, ...]
    lag: tuple[int, ...]
