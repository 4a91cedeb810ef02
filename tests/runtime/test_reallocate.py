"""Reallocation on gloo ranks, between many pairs of layouts, against tensors cut by hand."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from plans.layout import Layout, Parameter, trained_units
from plans.lora import Lora
from plans.model import ModelSpec
from runtime.weights import reallocate
from runtime.weights.reallocate import Moved, Reallocator, _Wave

SPEC = ModelSpec(
    name="tiny", layers=4, hidden=8, heads=4, kv_heads=4, head_dim=2, ffn=12, vocab=120, qkv_bias=True, qk_norm=True
)
TIED = replace(SPEC, tied_embeddings=True)
VALUE = SPEC.with_value_head()
FIVE = replace(TIED, layers=5)
WIDE = replace(SPEC, post_norms=True, wide_qk_norm=True)
ADAPTED = replace(TIED, lora=Lora(3, targets=("linear_qkv", "linear_fc1", "linear_fc2")))
MIXTURE = replace(SPEC, ffn=4, experts=8, experts_per_token=2, shared_ffn=12)


def layout(spec: ModelSpec, ranks: range, **degrees: Any) -> Layout:
    return Layout(spec, tuple(ranks), **degrees)


ALL, LOW, HIGH = range(4), range(2), range(2, 4)
PAIRS = {
    "same": (layout(SPEC, ALL, dp=2, tp=2), layout(SPEC, ALL, dp=2, tp=2)),
    "tp2 -> dp2": (layout(SPEC, LOW, tp=2), layout(SPEC, LOW, dp=2)),
    "dp4 -> tp2 pp2": (layout(SPEC, ALL, dp=4), layout(SPEC, ALL, tp=2, pp=2)),
    "tp2 pp2 -> dp4": (layout(SPEC, ALL, tp=2, pp=2), layout(SPEC, ALL, dp=4)),
    "tp2 dp2 -> pp4": (layout(SPEC, ALL, dp=2, tp=2), layout(SPEC, ALL, pp=4)),
    "tp2 pp2 -> tp2 dp2": (layout(SPEC, ALL, tp=2, pp=2), layout(SPEC, ALL, dp=2, tp=2)),
    "tp4 -> tp2 dp2": (layout(SPEC, ALL, tp=4), layout(SPEC, ALL, dp=2, tp=2)),
    "tp2 -> tp4": (layout(SPEC, LOW, tp=2), layout(SPEC, ALL, tp=4)),
    "disjoint tp2 -> pp2": (layout(SPEC, LOW, tp=2), layout(SPEC, HIGH, pp=2)),
    "disjoint tp2 -> dp2": (layout(SPEC, LOW, tp=2), layout(SPEC, HIGH, dp=2)),
    "disjoint one -> one": (layout(SPEC, range(1)), layout(SPEC, range(3, 4))),
    "overlapping pp4 -> tp2 on 2-3": (layout(SPEC, ALL, pp=4), layout(SPEC, HIGH, tp=2)),
    "gather to one": (layout(SPEC, ALL, tp=2, pp=2), layout(SPEC, range(1))),
    "spread from one": (layout(SPEC, range(1)), layout(SPEC, ALL, dp=2, pp=2)),
    "interleaved -> tp2": (layout(SPEC, LOW, pp=2, vpp=2), layout(SPEC, LOW, tp=2)),
    "tied pp2 -> tp2": (layout(TIED, LOW, pp=2), layout(TIED, LOW, tp=2)),
    "tied tp2 -> pp4": (layout(TIED, LOW, tp=2), layout(TIED, ALL, pp=4)),
    "tied pp2 -> tp2 pp2": (layout(TIED, HIGH, pp=2), layout(TIED, ALL, tp=2, pp=2)),
    "five layers pp2 -> tp2": (layout(FIVE, LOW, pp=2), layout(FIVE, LOW, tp=2)),
    "five layers pp3 -> pp4": (layout(FIVE, range(3), pp=3), layout(FIVE, ALL, pp=4)),
    "five layers pp4 -> tp2 pp2": (layout(FIVE, ALL, pp=4), layout(FIVE, ALL, tp=2, pp=2)),
    "five layers tp2 pp2 -> pp3": (layout(FIVE, ALL, tp=2, pp=2), layout(FIVE, range(1, 4), pp=3)),
    "five layers pp2 -> own split": (layout(FIVE, LOW, pp=2), layout(FIVE, LOW, pp=2, layers_per_stage=(1, 4))),
    "five layers own split -> dp2 pp2": (
        layout(FIVE, range(3), pp=3, layers_per_stage=(1, 1, 3)),
        layout(FIVE, ALL, dp=2, pp=2),
    ),
    "value head tp4 -> pp2": (layout(VALUE, ALL, tp=4), layout(VALUE, LOW, pp=2)),
    "value head pp2 -> dp2": (layout(VALUE, LOW, pp=2), layout(VALUE, HIGH, dp=2)),
    "experts ep4 -> one": (layout(MIXTURE, ALL, dp=4, ep=4), layout(MIXTURE, range(1))),
    "experts tp2 pp2 ep2 -> dp4 ep2": (layout(MIXTURE, ALL, tp=2, pp=2, ep=2), layout(MIXTURE, ALL, dp=4, ep=2)),
    "experts dp2 tp2 -> ep4": (layout(MIXTURE, ALL, dp=2, tp=2), layout(MIXTURE, ALL, dp=2, tp=2, ep=4)),
    "experts dp4 ep4 -> tp2 on 2-3": (layout(MIXTURE, ALL, dp=4, ep=4), layout(MIXTURE, HIGH, tp=2)),
    "adapters tp2 pp2 -> dp4": (layout(ADAPTED, ALL, tp=2, pp=2), layout(ADAPTED, ALL, dp=4)),
    "adapters disjoint tp2 -> pp2": (layout(ADAPTED, LOW, tp=2), layout(ADAPTED, HIGH, pp=2)),
    "adapters tp2 -> tp4": (layout(ADAPTED, LOW, tp=2), layout(ADAPTED, ALL, tp=4)),
    "experts disjoint ep2 -> pp2": (layout(MIXTURE, LOW, dp=2, ep=2), layout(MIXTURE, HIGH, pp=2)),
}


def random_layout(draw: random.Random, spec: ModelSpec) -> Layout:
    """Any degrees on some of the ranks, context and expert parallelism and splits of its own included."""
    size = draw.choice((1, 2, 4))
    first = draw.randrange(0, 5 - size)
    tp = draw.choice([d for d in (1, 2, 4) if size % d == 0])
    pp = draw.choice([d for d in (1, 2, 4) if size // tp % d == 0])
    cp = draw.choice([d for d in (1, 2, 4) if size // tp // pp % d == 0])
    degrees: dict[str, Any] = {"tp": tp, "pp": pp, "cp": cp, "dp": size // tp // pp // cp}
    if spec.experts:
        degrees["ep"] = draw.choice([d for d in (1, 2, 4) if size // pp % d == 0])
    if pp > 1 and draw.random() < 0.5:
        cuts = sorted(draw.sample(range(1, spec.layers), pp - 1))
        degrees["layers_per_stage"] = tuple(b - a for a, b in pairwise((0, *cuts, spec.layers)))
    return layout(spec, range(first, first + size), **degrees)


def random_pairs(count: int) -> dict[str, tuple[Layout, Layout]]:
    """Pairs of random layouts, from seeds."""
    found = {}
    for seed in range(count):
        draw = random.Random(seed)
        spec = draw.choice((SPEC, TIED, VALUE, FIVE, WIDE, MIXTURE, MIXTURE))
        found[f"random {seed}"] = random_layout(draw, spec), random_layout(draw, spec)
    return found


PAIRS |= random_pairs(40)


def whole(parameter: Parameter) -> Tensor:
    """The parameter's true values: distinct by name."""
    generator = torch.Generator().manual_seed(zlib.crc32(parameter.name.encode()))
    return torch.randn(parameter.shape, generator=generator)


def part(parameter: Parameter, values: Tensor, tp: int, rank: int) -> Tensor:
    """One tensor-parallel part, block by block."""
    if parameter.axis is None:
        return values.clone()
    blocks = values.chunk(parameter.blocks, parameter.axis)
    return torch.cat([block.chunk(tp, parameter.axis)[rank] for block in blocks], parameter.axis)


def shards(target: Layout, rank: int) -> dict[str, Tensor]:
    """What a rank holds in a layout."""
    if rank not in target.places:
        return {}
    place = target.places[rank]
    units = {unit.name: unit for unit in trained_units(target.spec)}
    held = [p for name in target.rank_units(rank) if name in units for p in units[name].parameters]
    return {p.name: part(p, whole(p), target.tp, place.tp) for p in held}


def owned(target: Layout, rank: int) -> set[tuple[str, int]]:
    """Flat indices into the whole parameters of what a rank holds."""
    if rank not in target.places:
        return set()
    place = target.places[rank]
    units = {unit.name: unit for unit in trained_units(target.spec)}
    found: set[tuple[str, int]] = set()
    for name in filter(units.__contains__, target.rank_units(rank)):
        for p in units[name].parameters:
            index = torch.arange(p.size).view(p.shape)
            found |= {(p.name, i) for i in part(p, index, target.tp, place.tp).flatten().tolist()}
    return found


@dataclass(frozen=True)
class Played:
    """What a rank moved, by pair, and the most that one wave of its held."""

    moved: dict[str, Moved]
    fullest: int


def move_all(wave_bytes: int, gpus_per_node: int, direct_bytes: int) -> Played:
    """Run every pair on this rank and check the result bit by bit."""
    rank, mover, moved, waves = dist.get_rank(), Reallocator(gpus_per_node, wave_bytes), {}, [0]
    begin = _Wave.__init__

    def watched(wave: _Wave, *streams: Any) -> None:
        begin(wave, *streams)
        waves.extend((wave.sent, wave.received))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Wave, "__init__", watched)
        patch.setattr(reallocate, "DIRECT_BYTES", direct_bytes)
        for name, (source, target) in PAIRS.items():
            want = {key: torch.full_like(value, torch.nan) for key, value in shards(target, rank).items()}
            if rank in {*source.ranks, *target.ranks}:
                moved[name] = mover.run(source, target, shards(source, rank), want)
            for key, value in shards(target, rank).items():
                assert torch.equal(want[key], value), f"{name}: {key} on rank {rank}"
    return Played(moved, max(waves))


CASES = [(2**25, 4, 2**20), (2**25, 2, 64), (1000, 1, 100)]


@pytest.mark.parametrize(("wave_bytes", "gpus_per_node", "direct_bytes"), CASES)
def test_bit_exact_and_minimal(wave_bytes: int, gpus_per_node: int, direct_bytes: int) -> None:
    results = run_ranks(4, move_all, wave_bytes, gpus_per_node, direct_bytes)
    for name, (source, target) in PAIRS.items():
        sent = sum(result.moved[name].sent for result in results if name in result.moved)
        received = sum(result.moved[name].received for result in results if name in result.moved)
        minimum = sum(len(owned(target, rank) - owned(source, rank)) for rank in range(4))
        assert sent == received == 4 * minimum, name
        assert Reallocator(gpus_per_node).plan(source, target).elements == minimum, name
    assert 0 < max(result.fullest for result in results) <= wave_bytes, "all peers share what a wave may hold"


def mix_all() -> bool:
    """Mix a quarter of the weights into -3 times them, which makes -2 times them, in every pair on this rank."""
    rank, mover = dist.get_rank(), Reallocator(2)
    move, most = Reallocator._move, 0

    def watched(self: Reallocator, *arguments: Any) -> Moved:
        assert sum(tensor.numel() for tensor in arguments[-1].values()) <= most, "twice there"
        return move(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reallocator, "_move", watched)
        for name, (source, target) in PAIRS.items():
            most = max(sum(p.size for p in unit.parameters) for unit in trained_units(target.spec))
            held = {key: -3 * value for key, value in shards(target, rank).items()}
            if rank in {*source.ranks, *target.ranks}:
                mover.mix(source, target, shards(source, rank), held, 0.25)
            for key, value in shards(target, rank).items():
                torch.testing.assert_close(held[key], -2 * value, msg=f"{name}: {key} on rank {rank}")
    return True


def test_mixing_holds_the_largest_unit_twice_and_no_more() -> None:
    assert all(run_ranks(4, mix_all))
