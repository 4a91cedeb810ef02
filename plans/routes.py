"""Router replay: the experts that generation chose for every token, which training and scoring use again.

Kernels and layouts of generation and training round differently, and with near ties their routers choose differently,
which no importance weight mends (Ma et al. 2025, arXiv:2510.11370, "rollout routing replay"). The `routes` of a sample
are the chosen experts of its tokens, layer by layer; training computes the gates anew from its own logits over those
experts. The last token of a sample is never read by generation, so it has no route: its router chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from plans.algorithms import tensor_kind
from plans.errors import SpecError
from plans.graph import Call, CallKind, DataflowGraph
from plans.model import ModelSpec

ROUTES = "routes"
ONE_BYTE = 256
"""Experts of a layer that one byte can number."""


def is_routes(key: str) -> bool:
    """Whether a tensor of a graph holds routes."""
    return tensor_kind(key) == ROUTES


def replays_routes(graph: DataflowGraph) -> bool:
    """Whether some call of a graph makes routes."""
    return any(is_routes(key) for call in graph.calls for key in call.outputs)


def routes_per_token(spec: ModelSpec) -> int:
    """Numbers of a token: one for every layer with experts and every expert that it visits there."""
    return spec.expert_layers * spec.experts_per_token


def route_bytes(spec: ModelSpec) -> int:
    """Bytes of one of these numbers."""
    return 1 if spec.experts <= ONE_BYTE else 2


def route_token_bytes(spec: ModelSpec) -> int:
    """Bytes of the routes of a token."""
    return routes_per_token(spec) * route_bytes(spec)


def routed_tokens(tokens: int) -> int:
    """Tokens of a sample of `tokens` that have a route: all but the last."""
    return max(tokens - 1, 0)


def call_routes(call: Call) -> tuple[str, ...]:
    """The routes that a call makes or reads."""
    return tuple(key for key in (*call.outputs, *call.inputs) if is_routes(key))


def check_routes(graph: DataflowGraph, models: Mapping[str, ModelSpec]) -> None:
    """Raise SpecError unless a model with experts makes the routes of a graph, and the same architecture reads them."""
    for fault, hint in _faults(graph, models):
        raise SpecError(f"router replay: {fault}", hint)


def _faults(graph: DataflowGraph, models: Mapping[str, ModelSpec]) -> Iterator[tuple[str, str]]:
    makers = {key: call for call in graph.calls for key in call.outputs if is_routes(key)}
    for key, call in makers.items():
        if call.kind is not CallKind.GENERATE:
            yield f"`{call.name}` writes `{key}`, and only generation chooses routes", "a call of kind generate"
        elif not models[call.model].experts:
            name = models[call.model].name
            yield f"`{call.model}` ({name}) has no experts to choose from", "leave router_replay out for a dense model"
    for call in graph.calls:
        for key in filter(is_routes, call.inputs):
            if key not in makers:
                yield f"`{call.name}` reads `{key}`, which no generation writes", "routes among the outputs of one"
            elif not call.model or models[call.model] != models[makers[key].model]:
                maker = makers[key].model
                message = f"`{call.name}` reads the routes of `{maker}`, whose experts are not those of its own model"
                yield message, f"leave `{key}` out, or a model like that of `{maker}`"
