"""Fixed cost tables of a benchmark as a `SearchProblem`.

Format: n_nodes, gpus_per_node, gpu_mem [bytes]; calls [{name, model, kind}]; edges [[a, b]]; options {call:
[[first_gpu, n_gpus, pp, tp, dp, time_us, mem_bytes, static_mem_bytes]]}; size_key {model: size}; realloc {size:
{"pp,tp,dp,pp,tp,dp": us}}.

A call waits for its data edges and for the previous call of its own model in graph order, the model's first call for
its last one of the iteration before. A move is free only where mesh and strategy are the same; where the strategy is
the same on another mesh, or no time is given, it is one shard over the network.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from planner.search.problem import Dependency, Moves, Options, SearchProblem
from plans.errors import SpecError

NETWORK_BYTES_PER_S = 25e9
NETWORK_LATENCY_S = 0.02
# size in billions -> hidden, intermediate, layers, heads, key-value heads, vocabulary (the tables' own architectures)
ARCHITECTURES = {
    7: (4096, 11008, 32, 32, 32, 32000),
    13: (5120, 13824, 40, 40, 40, 32000),
    34: (8192, 22016, 48, 64, 8, 32000),
    70: (8192, 28672, 80, 64, 8, 32000),
}


def parameters(size: int) -> int:
    """Parameters of a table's model of `size` billions."""
    if size not in ARCHITECTURES:
        raise SpecError(f"the table moves a model of size `{size}`", f"one of {sorted(ARCHITECTURES)}")
    hidden, intermediate, layers, heads, kv_heads, vocabulary = ARCHITECTURES[size]
    block = 2 * hidden * hidden + 2 * hidden * hidden * kv_heads // heads + 3 * hidden * intermediate
    return layers * block + 2 * vocabulary * hidden


def _graph_order(table: Mapping[str, Any]) -> list[str]:
    """Calls in the table's order, each pass taking those whose sources are placed."""
    placed: dict[str, None] = {}
    names = [call["name"] for call in table["calls"]]
    while len(placed) < len(names):
        before = len(placed)
        for name in names:
            if name not in placed and all(a in placed for a, b in table["edges"] if b == name):
                placed[name] = None
        if len(placed) == before:
            raise SpecError(f"the table's edges have a cycle among {sorted(set(names) - set(placed))}")
    return list(placed)


def _edges(table: Mapping[str, Any], order: list[str]) -> tuple[Dependency, ...]:
    at = {name: i for i, name in enumerate(order)}
    model = {call["name"]: call["model"] for call in table["calls"]}
    edges = {Dependency(at[a], at[b]): None for a, b in table["edges"]}
    for role in dict.fromkeys(model[name] for name in order):
        turn = [at[name] for name in order if model[name] == role]
        edges.update({Dependency(a, b): None for a, b in itertools.pairwise(turn)})
        edges[Dependency(turn[-1], turn[0], 1)] = None
    return tuple(edges)


def _strategy_seconds(table: Mapping[str, Any], size: str, source: tuple[int, ...], target: tuple[int, ...]) -> float:
    listed = table["realloc"].get(size, {}).get(",".join(map(str, source + target)), 0)
    if source == target or listed == 0:
        shard_bytes = 2 * parameters(int(size)) / (target[0] * target[1])
        listed = int((shard_bytes / NETWORK_BYTES_PER_S + NETWORK_LATENCY_S) * 1e6)
    return float(listed) / 1e6


def _moves(table: Mapping[str, Any], size: str, source: str, target: str) -> Moves:
    """Between the options of source and target, each pair of strategies looked up once."""
    rows, columns = (np.array([o[:5] for o in table["options"][name]]) for name in (source, target))
    kinds_a, of_a = np.unique(rows[:, 2:], axis=0, return_inverse=True)
    kinds_b, of_b = np.unique(columns[:, 2:], axis=0, return_inverse=True)
    small = np.array(
        [[_strategy_seconds(table, size, tuple(map(int, a)), tuple(map(int, b))) for b in kinds_b] for a in kinds_a]
    )
    seconds = small[of_a.reshape(-1)[:, None], of_b.reshape(-1)[None, :]]
    return Moves.of_options(np.where((rows[:, None, :] == columns[None, :, :]).all(axis=2), 0.0, seconds))


def _options(rows: list[list[int]], strategies: dict[tuple[int, ...], int]) -> Options:
    columns = np.array(rows)
    return Options(
        first=columns[:, 0],
        width=columns[:, 1],
        time_s=columns[:, 5] / 1e6,
        resident_bytes=columns[:, 7],
        transient_bytes=columns[:, 6] - columns[:, 7],
        layout=np.array([strategies.setdefault(tuple(row[2:5]), len(strategies)) for row in rows]),
    )


def problem_of(table: Mapping[str, Any]) -> SearchProblem:
    """The table as a problem; option indices stay the table's."""
    order = _graph_order(table)
    calls = {call["name"]: call for call in table["calls"]}
    trained = {call["model"]: call["name"] for call in table["calls"] if call["kind"] == "train_step"}
    strategies: dict[tuple[int, ...], int] = {}
    edges = dict.fromkeys(_edges(table, order))
    moves = {}
    for v, name in enumerate(order):
        source = trained.get(calls[name]["model"], name)
        if source != name:
            u = order.index(source)
            moves[u, v] = _moves(table, table["size_key"][calls[name]["model"]], source, name)
            edges[Dependency(u, v, 1)] = None
    return SearchProblem(
        gpus=table["n_nodes"] * table["gpus_per_node"],
        capacity_bytes=table["gpu_mem"],
        names=tuple(order),
        options=tuple(_options(table["options"][name], strategies) for name in order),
        edges=tuple(edges),
        moves=moves,
    )


def load(path: Path) -> SearchProblem:
    """Read a table file."""
    try:
        table = json.loads(path.read_text("utf-8"))
        return problem_of(table)
    except (OSError, json.JSONDecodeError) as error:
        raise SpecError(f"{path}: not a readable cost table ({error})") from error
    except (KeyError, IndexError, TypeError) as error:
        raise SpecError(f"{path}: the cost table lacks or misspells {error}") from error
