"""The dataflow graph of one iteration: model function calls and function calls, joined by what they read and write.

Edges follow from names of inputs and outputs, and from parameter versions: a call of a trained model in iteration
t + 1 reads the weights that its training call of iteration t wrote. Nothing here knows where a call runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from plans.errors import SpecError, nearest

if TYPE_CHECKING:
    pass


MOST_STALENESS = 64
"""Iterations that generation may run ahead."""
_Name = TypeVar("_Name", int, str)


class CallKind(StrEnum):
    """What a call does: sample responses, one forward pass, optimizer steps, or a Python function on the CPU."""

    GENERATE = "generate"
    INFERENCE = "inference"
    TRAIN_STEP = "train_step"
    FUNCTION = "function"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call: `model` is a role (`actor`), empty for a function; `seconds_per_sample` is a function's cost.

    `inputs` and `outputs` name per-sample tensors. loss: what a train_step of the user's own graph minimises, the name
    of an algorithm or `file.py:function`; empty in the graphs of algorithms, which say it by their name.
    """

    name: str
    kind: CallKind
    model: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    seconds_per_sample: float = 0.0
    loss: str = ""

    def __post_init__(self) -> None:
        if self.loss and self.kind is not CallKind.TRAIN_STEP:
            raise SpecError(f"call `{self.name}`: only a train_step has a loss", "leave out `loss`")
        if (self.kind is CallKind.FUNCTION) == bool(self.model):
            legal = "leave out `model`" if self.model else "model: actor, for example"
            raise SpecError(f"call `{self.name}`: a function call has no model, every other call has one", legal)


@dataclass(frozen=True, slots=True)
class Edge:
    """`target` of iteration t comes after `source` of iteration t - `distance`, a later one where that is below 0."""

    source: str
    target: str
    distance: int = 0


@dataclass(frozen=True, slots=True)
class GraphFault:
    """What keeps calls from being a graph; `index` is the call's place in the list."""

    index: int
    message: str
    hint: str


def graph_faults(calls: Sequence[Call], sources: Sequence[str]) -> Iterator[GraphFault]:
    """Every broken rule of a graph: names are unique, what is read was written before, by one call, a function reads
    what a call before it made, because it runs on that call's ranks, and a role has one training call."""
    writers: dict[str, str] = dict.fromkeys(sources, "")
    names: set[str] = set()
    trained: set[str] = set()
    if not any(call.model for call in calls):
        yield GraphFault(0, "no call of the graph has a model", "at least one call of kind generate or train_step")
    for i, call in enumerate(calls):
        if call.name in names:
            yield GraphFault(i, f"the name `{call.name}` is used twice", f"`{call.name}_2`, for example")
        for key in call.inputs:
            if key not in writers:
                yield GraphFault(
                    i, f"call `{call.name}` reads `{key}` before any call writes it", nearest(key, [*writers])
                )
        if not call.model and not (call.inputs and writers.get(call.inputs[0])):
            made = [key for key, writer in writers.items() if writer]
            hint = f"inputs: [{made[-1]}]" if made else "put it after the call that makes its input"
            yield GraphFault(i, f"function `{call.name}` must read first what a call before it writes", hint)
        for key in call.outputs:
            if key in writers:
                other = f"call `{writers[key]}` writes" if writers[key] else "the data set provides"
                yield GraphFault(i, f"call `{call.name}` writes `{key}`, which {other}", f"`{key}_2`, for example")
            writers[key] = call.name
        if call.kind is CallKind.TRAIN_STEP and call.model in trained:
            yield GraphFault(i, f"role `{call.model}` is trained twice in an iteration", "one train_step per role")
        names.add(call.name)
        trained |= {call.model} if call.kind is CallKind.TRAIN_STEP else set()


def least_lags(order: Sequence[_Name], edges: Iterable[tuple[_Name, _Name, int]]) -> dict[_Name, int]:
    """The least lag of every call, from 0, under which calls in this order keep edges (source, target, distance).

    Longest paths (Bellman and Ford). Raises SpecError where edges contradict each other in a cycle.
    """
    place = {call: i for i, call in enumerate(order)}
    waits = [(u, v, (place[u] > place[v]) - distance) for u, v, distance in edges if u != v]
    lags = dict.fromkeys(order, 0)
    for _ in range(len(order) + 1):
        if all(lags[u] + more <= lags[v] for u, v, more in waits):
            return lags
        for u, v, more in waits:
            lags[v] = max(lags[v], lags[u] + more)
    raise SpecError("calls wait for each other in a circle, whatever their lags", "let one of them read less")


@dataclass(frozen=True, kw_only=True)
class DataflowGraph:
    """Calls of one iteration in a topological order; `sources` are the tensors that the data set provides.

    `staleness`: iterations that generation runs ahead, exactly: in iteration t it reads the weights that t - staleness
    trainings have made (0: on-policy), in the first ones those that the run began with.
    """

    name: str
    calls: tuple[Call, ...]
    sources: tuple[str, ...] = ("prompts",)
    staleness: int = 0

    def __post_init__(self) -> None:
        for fault in graph_faults(self.calls, self.sources):
            raise SpecError(f"graph `{self.name}`: {fault.message}", fault.hint)

    def call(self, name: str) -> Call:
        """The call of that name."""
        for call in self.calls:
            if call.name == name:
                return call
        raise SpecError(f"graph `{self.name}` has no call `{name}`", nearest(name, [c.name for c in self.calls]))

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the models, in order of first use."""
        return tuple(dict.fromkeys(call.model for call in self.calls if call.model))

    @property
    def model_calls(self) -> tuple[Call, ...]:
        """Calls that run on a mesh of their own."""
        return tuple(call for call in self.calls if call.kind is not CallKind.FUNCTION)

    @cached_property
    def producers(self) -> dict[str, str]:
        """Tensor name -> the call that writes it."""
        return {key: call.name for call in self.calls for key in call.outputs}

    @cached_property
    def trainers(self) -> dict[str, str]:
        """Role -> its training call, for trained models."""
        return {call.model: call.name for call in self.calls if call.kind is CallKind.TRAIN_STEP}

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Data edges (distance 0), then parameter-version edges (distance 1, plus the staleness for generation)."""
        data = {
            Edge(self.producers[key], call.name): None
            for call in self.calls
            for key in call.inputs
            if key in self.producers
        }
        versions = [
            Edge(self.trainers[call.model], call.name, 1 + self.staleness * (call.kind is CallKind.GENERATE))
            for call in self.calls
            if call.model in self.trainers
        ]
        return (*data, *versions)

    @cached_property
    def version_ends(self) -> tuple[Edge, ...]:
        """Edges that order calls and let none wait: a call takes the weights that it should read before the training
        that makes newer ones, which is that of its own iteration, or one `staleness` iterations before."""
        return tuple(
            Edge(call.name, self.trainers[call.model], -self.staleness * (call.kind is CallKind.GENERATE))
            for call in self.calls
            if call.model in self.trainers and call.kind is not CallKind.TRAIN_STEP
        )

    @cached_property
    def first_lags(self) -> Mapping[str, int]:
        """The least lags under which the calls can stand in the order of the graph."""
        edges = ((e.source, e.target, e.distance) for e in (*self.model_edges, *self.version_ends))
        return least_lags([call.name for call in self.model_calls], edges)

    def host(self, name: str) -> str:
        """The model call on whose ranks a call runs: itself, or for a function the producer of its first input."""
        call = self.call(name)
        return name if call.model else self.host(self.producers[call.inputs[0]])

    @cached_property
    def model_edges(self) -> tuple[Edge, ...]:
        """Edges between model calls, functions contracted into the calls that host them."""
        found: dict[Edge, None] = {}
        for edge in self.edges:
            contracted = Edge(self.host(edge.source), self.host(edge.target), edge.distance)
            if contracted.source != contracted.target or edge.distance:
                found[contracted] = None
        return tuple(found)
