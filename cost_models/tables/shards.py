"""The shard of a model that one rank of a tensor-parallel cut computes, as a model of its own."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from plans.errors import SpecError
from plans.model import ModelSpec


@lru_cache(maxsize=64)
def shard_spec(spec: ModelSpec, tp: int) -> ModelSpec:
    """One layer with the sizes that a rank of a tp-way cut has: on one device it does what the rank does between
    collectives."""
    for name in ("heads", "kv_heads", "ffn", "padded_vocab"):
        size = getattr(spec, name)
        if size % tp:
            raise SpecError(
                f"model `{spec.name}`: {name} {size} is not a multiple of tp {tp}",
                f"tp one of {', '.join(map(str, legal_degrees(spec, range(1, 65))))}",
            )
    return replace(
        spec,
        name=f"{spec.name}/tp{tp}",
        layers=1,
        heads=spec.heads // tp,
        kv_heads=spec.kv_heads // tp,
        ffn=spec.ffn // tp,
        vocab=spec.padded_vocab // tp if tp > 1 else spec.vocab,
    )


def legal_degrees(spec: ModelSpec, wanted: range | tuple[int, ...]) -> tuple[int, ...]:
    """Those tensor-parallel degrees that divide the model."""
    sizes = (spec.heads, spec.kv_heads, spec.ffn, spec.padded_vocab)
    return tuple(tp for tp in wanted if not any(size % tp for size in sizes))


def call_spec(shard: ModelSpec, vocab: int) -> ModelSpec:
    """The shard on which whole calls are timed: its vocabulary is small, so that the head hides nothing."""
    return replace(shard, name=f"{shard.name}/calls", vocab=vocab)
