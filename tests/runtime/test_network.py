"""Weights between two machines (network namespaces): what the kernel counts on the wire."""

from __future__ import annotations

from bench_network import PAIRS, bench_spec, copy_bytes, loaded, measured


def test_one_copy_per_machine_crosses_the_network() -> None:
    """However many ranks of the other machine need the weights, and whatever part of them each."""
    spec = bench_spec(layers=2, hidden=256)
    copy = copy_bytes(spec)
    assert copy > 4 * 2 * spec.vocab * spec.hidden  # embeddings, which are not tied, in float32
    figures = measured(spec)
    assert figures.keys() == PAIRS.keys()
    figures["a folder that one machine has"] = loaded(spec)
    for name, (received, _) in figures.items():
        assert copy < received < 1.02 * copy + 2**16, f"{name}: {received:,} bytes, a copy has {copy:,}"
