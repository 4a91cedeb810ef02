"""Graphs of the user's own, from the `graph` of a plan or a YAML file, and back."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ValidationError

from plans.algorithms import ALGORITHMS
from plans.errors import SpecError
from plans.graph import Call, CallKind, DataflowGraph
from plans.planfile import GraphCallFile, GraphFile


def graph_of(file: GraphFile, staleness: int = 0) -> DataflowGraph:
    """The dataflow graph that a file describes; raises SpecError when it has the name of an algorithm."""
    if file.name in ALGORITHMS:
        raise SpecError(f"graph `{file.name}` has the name of a built-in algorithm", "give the graph another name")
    calls = tuple(
        Call(
            name=call.name,
            kind=CallKind(call.kind),
            model=call.model,
            inputs=tuple(call.inputs),
            outputs=tuple(call.outputs),
            seconds_per_sample=call.seconds_per_sample,
        )
        for call in file.calls
    )
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
        )
        for call in graph.calls
    ]
    return GraphFile(name=graph.name, calls=calls, sources=list(graph.sources))


def load_graph(path: Path) -> DataflowGraph:
    """Read a graph from YAML (keys as in the `graph` of a plan file)."""
    try:
        data = yaml.safe_load(path.read_text())
        file = GraphFile.model_validate(data)
    except OSError as error:
        raise SpecError(f"cannot read graph `{path}`: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not YAML: {error}") from None
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(str(step) for step in detail["loc"])
        raise SpecError(f"{path}: {where}: {detail['msg']}", "keys: name, calls, sources") from None
    if file.name in ALGORITHMS:
        raise SpecError(f"{path}: `{file.name}` is the name of a built-in algorithm", "give the graph another name")
    return graph_of(file)
