"""Who writes what of a checkpoint, and where a reader finds it, against numpy's own cutting."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from plans.checkpoint import Entry, missing, overlaps, parameters_of, replicas, written
from plans.layout import Layout, Parameter, model_units
from plans.model import ModelSpec
from runtime.groups import rank_sets

DENSE = ModelSpec(name="small", layers=4, hidden=16, heads=8, kv_heads=4, head_dim=4, ffn=24, vocab=100, max_context=64)
TIED = replace(DENSE, tied_embeddings=True, qkv_bias=True)
MIXED = replace(DENSE, experts=4, experts_per_token=2, shared_ffn=8)
LAYOUTS = [
    {},
    {"dp": 3},
    {"tp": 2},
    {"tp": 4, "dp": 2},
    {"pp": 2, "dp": 2},
    {"tp": 2, "pp": 2, "dp": 2},
    {"tp": 2, "pp": 2, "vpp": 2},
    {"cp": 2, "dp": 2},
]
RUNS = [*LAYOUTS, {"dp": 4, "ep": 2}, {"dp": 2, "tp": 2, "ep": 4}, {"dp": 4, "pp": 2, "ep": 2}]


def layout(spec: ModelSpec, degrees: dict[str, int]) -> Layout:
    size = np.prod([degrees.get(name, 1) for name in ("dp", "tp", "pp", "cp")])
    return Layout(spec, tuple(range(int(size))), **degrees)


def cut(parameter: Parameter, whole: np.ndarray, part: int, parts: int) -> np.ndarray:
    """A slice as tensor parallelism cuts it, flat."""
    if parameter.axis is None:
        return whole.ravel()
    blocks = np.split(whole, parameter.blocks, parameter.axis)
    kept = [np.split(block, parts, parameter.axis)[part] for block in blocks]
    return np.concatenate(kept, parameter.axis).ravel()


@pytest.mark.parametrize(
    ("spec", "degrees"), [*((s, d) for s in (DENSE, TIED) for d in LAYOUTS), *((MIXED, d) for d in RUNS)]
)
@pytest.mark.parametrize("sharded", [False, True])
def test_every_element_is_written_once(spec: ModelSpec, degrees: dict[str, int], sharded: bool):
    chosen = layout(spec, degrees)
    seen = {name: np.zeros(parameter.size, int) for name, parameter in parameters_of(spec).items()}
    places = {name: np.arange(p.size).reshape(p.shape) for name, p in parameters_of(spec).items()}
    entries = []
    for rank in chosen.ranks:
        entries += written(chosen, rank, owned_ranges(chosen, rank) if sharded else None)
    for entry in entries:
        parameter = parameters_of(spec)[entry.parameter]
        held = cut(parameter, places[entry.parameter], entry.part, entry.parts)
        seen[entry.parameter][held[entry.start : entry.stop]] += 1
    assert all((count == 1).all() for count in seen.values())
    assert missing(spec, entries) == ""


def owned_ranges(layout: Layout, rank: int) -> dict[str, tuple[int, int]]:
    """A rank's ranges when its replicas share one buffer of all parameters, as a distributed optimizer cuts it."""
    found: dict[str, tuple[int, int]] = {}
    units = {unit.name: unit for unit in model_units(layout.spec)}
    buffers: dict[tuple[int, ...], list[tuple[str, int]]] = {}
    for name in layout.rank_units(rank):
        for parameter in units[name].parameters:
            parts = 1 if parameter.axis is None else layout.tp
            buffers.setdefault(replicas(layout, rank, name), []).append((parameter.name, parameter.size // parts))
    for group, held in buffers.items():
        total = sum(size for _, size in held)
        share = -(-total // len(group))
        first = group.index(rank) * share
        at = 0
        for name, size in held:
            start, stop = max(first - at, 0), min(first + share - at, size)
            if start < stop:
                found[name] = (start, stop)
            at += size
    return found


@pytest.mark.parametrize("degrees", RUNS)
def test_replicas_are_those_of_the_groups(degrees: dict[str, int]):
    chosen = layout(MIXED, degrees)
    sets = rank_sets(chosen)
    for rank in chosen.ranks:
        dense, expert = (next(ranks for ranks in sets[name] if rank in ranks) for name in ("dp_cp", "expt_dp"))
        assert replicas(chosen, rank, "layer.0") == dense
        assert replicas(chosen, rank, "layer.0.expert.1") == expert


SHAPES = [
    Parameter("flat", (37,)),
    Parameter("column", (12, 5), 0),
    Parameter("gated", (24, 3), 0, 2),
    Parameter("row", (7, 12), 1),
    Parameter("bias", (24,), 0, 2),
]


@pytest.mark.parametrize("parameter", SHAPES, ids=lambda p: p.name)
def test_a_reader_of_another_cut_finds_its_elements(parameter: Parameter):
    rng = random.Random(parameter.name)
    whole = np.arange(parameter.size).reshape(parameter.shape)
    for _ in range(60):
        have, want = (1, 1) if parameter.axis is None else (rng.choice([1, 2, 3, 4, 6]), rng.choice([1, 2, 3, 4, 6]))
        stored = [e for part in range(have) for e in random_ranges(rng, parameter, part, have)]
        for part in range(want):
            for wanted in random_ranges(rng, parameter, part, want):
                made = np.full(wanted.size, -1)
                for entry in stored:
                    source = cut(parameter, whole, entry.part, have)[entry.start : entry.stop]
                    for o in overlaps(parameter, entry, wanted):
                        for row in range(o.rows):
                            a, b = o.source + row * o.source_stride, o.target + row * o.target_stride
                            assert (made[b : b + o.width] == -1).all()
                            made[b : b + o.width] = source[a : a + o.width]
                assert (made == cut(parameter, whole, part, want)[wanted.start : wanted.stop]).all()


def random_ranges(rng: random.Random, parameter: Parameter, part: int, parts: int) -> list[Entry]:
    """A slice cut into up to four ranges at random places."""
    size = parameter.size // parts
    cuts = sorted({0, size, *(rng.randrange(size) for _ in range(3))})
    return [Entry(parameter.name, part, parts, a, b) for a, b in pairwise(cuts)]


def test_gaps_and_strangers_are_named():
    entries = written(layout(DENSE, {}), 0)
    assert "ends at element 0 of part 0" in missing(DENSE, entries[1:])
    assert "has a gap or an overlap" in missing(DENSE, [*entries, entries[3]])
    assert "is no parameter of the model" in missing(DENSE, [*entries, Entry("other", 0, 1, 0, 1)])
    short = replace(entries[0], stop=entries[0].stop - 1)
    assert "embedding.word_embeddings.weight` ends at" in missing(DENSE, [short, *entries[1:]])
