"""The arithmetic of reallocation against sets of elements, for random pairs of layouts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import cache

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from plans.layout import Layout, model_units
from plans.model import ModelSpec
from plans.reallocation import Piece, Reallocation, reallocation

SPEC = ModelSpec(name="tiny", layers=4, hidden=4, heads=4, kv_heads=4, head_dim=2, ffn=8, vocab=8)
MIXTURE = replace(SPEC, ffn=4, experts=4, experts_per_token=2, shared_ffn=8)
SPECS = [SPEC, replace(SPEC, tied_embeddings=True), SPEC.with_value_head(), MIXTURE]
WORLD = 8

Element = tuple[str, int]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Layout, Layout, int]:
    """Two layouts of one model in a world of 8 ranks, and the ranks of a node."""
    spec = draw(st.sampled_from(SPECS))
    return draw(layouts(spec)), draw(layouts(spec)), draw(st.sampled_from([1, 2, 4, 8]))


@st.composite
def layouts(draw: st.DrawFn, spec: ModelSpec) -> Layout:
    """A layout on an aligned run of ranks."""
    size = draw(st.sampled_from([1, 2, 4, 8]))
    first = draw(st.sampled_from(range(0, WORLD, size)))
    tp = draw(st.sampled_from([t for t in (1, 2, 4) if t <= size]))
    pp = draw(st.sampled_from([p for p in (1, 2, 4) if tp * p <= size]))
    ep = draw(st.sampled_from([e for e in (1, 2, 4) if spec.experts and e <= size // pp] or [1]))
    return Layout(spec, tuple(range(first, first + size)), dp=size // tp // pp, tp=tp, pp=pp, ep=ep)


def own_experts(layout: Layout, rank: int) -> range:
    """Megatron's order without expert tensor parallelism: the ranks of a stage are counted off in runs of ep."""
    in_stage = (rank - layout.ranks[0]) % (len(layout.ranks) // layout.pp)
    each = layout.spec.experts // layout.ep
    return range(in_stage % layout.ep * each, (in_stage % layout.ep + 1) * each)


@cache
def held(layout: Layout, rank: int) -> frozenset[Element]:
    """(parameter, flat index) of everything a rank holds, cut with numpy."""
    if rank not in layout.places:
        return frozenset()
    place = layout.places[rank]
    units = {unit.name: unit for unit in model_units(layout.spec)}
    found: set[Element] = set()
    for unit in layout.stage_units(place.pp):
        if ".expert." in unit and int(unit.split(".")[3]) not in own_experts(layout, rank):
            continue
        for p in units[unit].parameters:
            index = np.arange(p.size).reshape(p.shape)
            if p.axis is not None:
                blocks = np.split(index, p.blocks, p.axis)
                index = np.concatenate([np.split(b, layout.tp, p.axis)[place.tp] for b in blocks], p.axis)
            found |= {(p.name, int(i)) for i in index.ravel()}
    return frozenset(found)


def content(spec: ModelSpec, piece: Piece, grid: int) -> set[Element]:
    """The elements that a piece names."""
    found: set[Element] = set()
    for p in next(unit for unit in model_units(spec) if unit.name == piece.unit).parameters:
        index = np.arange(p.size).reshape(p.shape)
        if p.axis is None:
            index = index if piece.replicated else index[:0]
        else:
            cut = [slice(None)] * index.ndim
            width = p.shape[p.axis] // p.blocks // grid
            cut[p.axis] = slice(piece.start * width, piece.stop * width)
            index = np.concatenate([b[tuple(cut)].ravel() for b in np.split(index, p.blocks, p.axis)])
        found |= {(p.name, int(i)) for i in index.ravel()}
    return found


def received(plan: Reallocation, spec: ModelSpec) -> dict[int, list[tuple[int, int, set[Element]]]]:
    """Target rank -> (round, source, elements) of what reaches it."""
    found: dict[int, list[tuple[int, int, set[Element]]]] = defaultdict(list)
    for t in plan.moves:
        elements = content(spec, t.piece, plan.grid)
        assert len(elements) == t.elements
        found[t.target].append((t.round, t.source, elements))
    return found


@settings(max_examples=60, deadline=None)
@given(pairs())
def test_everything_arrives_once_and_nothing_more(case: tuple[Layout, Layout, int]) -> None:
    source, target, per_node = case
    plan = reallocation(source, target, per_node)
    arrivals = received(plan, source.spec)
    assert set(arrivals) <= set(target.ranks)
    for rank in target.ranks:
        missing = held(target, rank) - held(source, rank)
        kept = set().union(*(content(source.spec, piece, plan.grid) for r, piece in plan.local if r == rank))
        got = [elements for _, _, elements in arrivals[rank]]
        assert sum(map(len, got)) == len(missing) and set().union(*got) == missing
        assert kept == held(target, rank) & held(source, rank)
    assert plan.elements == sum(len(held(target, r) - held(source, r)) for r in target.ranks)


@settings(max_examples=60, deadline=None)
@given(pairs())
def test_senders_hold_what_they_send(case: tuple[Layout, Layout, int]) -> None:
    source, target, per_node = case
    plan = reallocation(source, target, per_node)
    arrivals = received(plan, source.spec)
    for entries in arrivals.values():
        for turn, sender, elements in entries:
            first = set().union(*(e for t, _, e in arrivals.get(sender, []) if t == 0))
            assert elements <= (held(source, sender) if turn == 0 else first)


@settings(max_examples=60, deadline=None)
@given(pairs())
def test_the_network_carries_a_slice_to_a_node_once(case: tuple[Layout, Layout, int]) -> None:
    source, target, per_node = case
    plan = reallocation(source, target, per_node)
    crossed: dict[int, list[Element]] = defaultdict(list)
    for t in plan.moves:
        if t.source // per_node != t.target // per_node:
            # Replicated parameters (norms) go with every tensor-parallel slice, so they may cross with each.
            crossed[t.target // per_node] += content(source.spec, replace(t.piece, replicated=False), plan.grid)
    for node, elements in crossed.items():
        local = set().union(*(held(source, r) for r in range(node * per_node, (node + 1) * per_node)))
        assert len(elements) == len(set(elements)) and not local & set(elements)


@settings(max_examples=60, deadline=None)
@given(pairs())
def test_steps_relay_what_has_come_two_steps_before(case: tuple[Layout, Layout, int]) -> None:
    """One step of two may still be on its way when a rank sends."""
    source, target, per_node = case
    plan = reallocation(source, target, per_node)
    sizes = {unit.name: sum(p.size for p in unit.parameters) for unit in model_units(source.spec)}
    steps = plan.steps(sizes)
    listed = [(number, stream, piece) for number, step in enumerate(steps) for stream in step for piece in step[stream]]
    assert sorted((*stream, piece) for _, stream, piece in listed) == sorted(
        (move.source, move.target, move.round, move.piece) for move in plan.moves
    )
    came = {(receiver, piece): number for number, (_, receiver, turn), piece in listed if turn == 0}
    for number, (sender, _, turn), piece in listed:
        assert turn == 0 or came[sender, piece] <= number - 2
    if any(move.round for move in plan.moves):
        most = max(*sizes.values(), sum(sizes.values()) // 8)
        for step in steps:
            crossing = {piece.unit for (_, _, turn), pieces in step.items() for piece in pieces if turn == 0}
            assert sum(sizes[unit] for unit in crossing) <= most
