"""Closed-form reallocation traffic against the transfers that `plans.reallocation` lists."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pytest

from cost_models.engines import Engine, load_engine
from cost_models.machine import Machine
from cost_models.reallocation import reallocation_matrix, reallocation_time, reallocation_traffic, transfer_time
from plans.cluster import ClusterSpec, all_meshes
from plans.layout import Layout
from plans.library import load_cluster, load_model
from plans.model import ModelSpec
from plans.reallocation import reallocation
from plans.strategy import ParallelStrategy


def tiny(**changes: object) -> ModelSpec:
    sizes: dict[str, object] = {"layers": 4, "hidden": 32, "heads": 8, "kv_heads": 8, "ffn": 48, "vocab": 256}
    return ModelSpec(name="tiny", head_dim=4, **(sizes | changes))  # type: ignore[arg-type]


def layouts(cluster: ClusterSpec, spec: ModelSpec) -> list[Layout]:
    found = []
    for mesh in all_meshes(cluster):
        for tp, pp, vpp in itertools.product((1, 2, 4), (1, 2, 4), (1, 2)):
            fits = mesh.size % (tp * pp) == 0 and tp <= mesh.gpus and 4 % (pp * vpp) == 0
            if fits and (vpp == 1 or pp > 1):
                strategy = ParallelStrategy(dp=mesh.size // (tp * pp), tp=tp, pp=pp, vpp=vpp)
                found.append(Layout.of(spec, mesh, strategy, cluster))
    return found


def engine_of(cluster: ClusterSpec) -> Engine:
    return load_engine("megatron", cluster.gpu.name)


@pytest.mark.parametrize(
    "spec",
    [tiny(), tiny(tied_embeddings=True), tiny().with_value_head()],
    ids=["untied", "tied", "value"],
)
def test_bytes_equal_the_listed_transfers(spec: ModelSpec) -> None:
    cluster = load_cluster("a100-80gb", gpus=12, gpus_per_node=4)
    generator = random.Random(1)
    sources, targets = (generator.sample(layouts(cluster, spec), 14) for _ in range(2))
    moved = reallocation_traffic(cluster, sources, targets)
    for (i, source), (j, target) in itertools.product(enumerate(sources), enumerate(targets)):
        listed = reallocation(source, target, 4).transfers
        assert moved.received[i, j] == pytest.approx(sum(t.elements for t in listed), abs=0.5)
        across = [t for t in listed if t.source // 4 != t.target // 4]
        assert moved.network[i, j] == pytest.approx(sum(t.elements for t in across), abs=0.5), (source, target)


def test_nothing_moves_between_equal_layouts() -> None:
    cluster = load_cluster("a100-80gb", gpus=8, gpus_per_node=4)
    found = layouts(cluster, tiny())
    seconds = reallocation_matrix(cluster, engine_of(cluster), 2, found, found)
    assert np.all(np.diag(seconds) == 0)
    assert np.all(seconds >= 0)


def test_seventy_billion_takes_its_bytes_over_the_network() -> None:
    cluster = load_cluster("a100-80gb", gpus=16)
    spec = load_model("llama-70b")
    first, second = Layout(spec, tuple(range(8)), tp=8), Layout(spec, tuple(range(8, 16)), tp=8)
    machine = Machine(cluster, engine_of(cluster))
    seconds = reallocation_time(cluster, machine.engine, 2, [(first, second)])[0]
    least = spec.params * 2 / (8 * machine.network_bytes_per_s)
    assert least < seconds < 1.2 * least


def test_forty_thousand_pairs_in_seconds() -> None:
    cluster = load_cluster("a100-80gb", gpus=128)
    generator = random.Random(0)
    meshes = [mesh for mesh in all_meshes(cluster) if mesh.size >= 8]
    spec, found = load_model("llama-70b"), []
    while len(found) < 200:
        mesh, tp, pp = generator.choice(meshes), generator.choice((1, 2, 4, 8)), generator.choice((1, 2, 4, 8))
        if mesh.size % (tp * pp) == 0:
            strategy = ParallelStrategy(dp=mesh.size // (tp * pp), tp=tp, pp=pp)
            found.append(Layout.of(spec, mesh, strategy, cluster))
    started = time.perf_counter()
    seconds = reallocation_matrix(cluster, engine_of(cluster), 2, found, found)
    assert seconds.shape == (200, 200)
    assert time.perf_counter() - started < 6.0


def test_transfer_waits_for_the_busiest_rank() -> None:
    cluster = load_cluster("a100-80gb", gpus=16)
    machine = Machine(cluster, engine_of(cluster))
    inside = transfer_time(cluster, machine.engine, [(0, 1), (2, 3)], [1e9, 1e9])
    assert inside == pytest.approx(machine.engine.message_s + 1e9 / machine.link_bytes_per_s)
    across = transfer_time(cluster, machine.engine, [(0, 8), (1, 8)], [1e9, 1e9])
    assert across == pytest.approx(2 * (machine.engine.message_s + 1e9 / machine.network_bytes_per_s))
    assert transfer_time(cluster, machine.engine, [], []) == 0.0
