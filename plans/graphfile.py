"""Graphs of the user's own, from the `graph` of a plan or a YAML file, and back."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from plans.algorithms import ALGORITHMS
from plans.documents import BadText, read_text, refuse
from plans.errors import SpecError
from plans.graph import Call, CallKind, DataflowGraph, graph_faults
from plans.planfile import GraphCallFile, GraphFile
from plans.problems import Problem
from plans.shapes import shape_problems


def graph_of(file: GraphFile, staleness: int = 0) -> DataflowGraph:
    """The dataflow graph that a file describes; raises SpecError when it has the name of an algorithm."""
    if file.name in ALGORITHMS:
        raise SpecError(f"graph `{file.name}` has the name of a built-in algorithm", "give the graph another name")
    calls = tuple(_call(call) for call in file.calls)
    return DataflowGraph(name=file.name, calls=calls, sources=tuple(file.sources), staleness=staleness)


def file_of(graph: DataflowGraph) -> GraphFile | None:
    """How a plan file describes a graph; None for a graph that has a name in the library."""
    if graph.name in ALGORITHMS:
        return None
    calls = [
        GraphCallFile(
            name=call.name,
            kind=call.kind.value,
            model=call.model,
            inputs=list(call.inputs),
            outputs=list(call.outputs),
            seconds_per_sample=call.seconds_per_sample,
            loss=call.loss,
        )
        for call in graph.calls
    ]
    return GraphFile(name=graph.name, calls=calls, sources=list(graph.sources))


def load_graph(path: Path) -> DataflowGraph:
    """Read a graph from YAML (keys as in the `graph` of a plan file); raises SpecError with every located problem."""
    from plans.yaml_text import MOST_YAML_BYTES, parse_yaml  # plan files, which hold graphs too, do without

    text = read_text(path, SpecError, "graph", "keys: name, calls, sources", MOST_YAML_BYTES)
    try:
        document = parse_yaml(text)
    except BadText as error:
        refuse(SpecError, path, [error.problem])
    try:
        file = GraphFile.model_validate(document.data)
    except ValidationError as error:
        refuse(SpecError, path, document.locate(shape_problems(GraphFile, document.data, error, "the graph")))
    if file.name in ALGORITHMS:
        message = f"`{file.name}` is the name of a built-in algorithm"
        refuse(SpecError, path, document.locate([Problem("name", message, f"name: my-{file.name}", ("name",))]))
    problems = own_graph_problems(file)
    return refuse(SpecError, path, document.locate(problems)) if problems else graph_of(file)


def own_graph_problems(file: GraphFile) -> list[Problem]:
    """What keeps a file from being a graph, with paths below it: the rules of `Call` and `DataflowGraph`."""
    problems, calls = [], []
    for i, call in enumerate(file.calls):
        try:
            calls.append(_call(call))
        except SpecError as error:
            problems.append(Problem("graph", error.message, error.hint, ("calls", i)))
    if not problems:
        faults = graph_faults(calls, file.sources)
        problems = [Problem("graph", fault.message, fault.hint, ("calls", fault.index)) for fault in faults]
    return problems


def _call(call: GraphCallFile) -> Call:
    return Call(
        name=call.name,
        kind=CallKind(call.kind),
        model=call.model,
        inputs=tuple(call.inputs),
        outputs=tuple(call.outputs),
        seconds_per_sample=call.seconds_per_sample,
        loss=call.loss,
    )
