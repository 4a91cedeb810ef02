"""Closed-form reallocation traffic against the transfers that `plans.reallocation` lists."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pytest

from cost_models.engines import load_engine
from cost_models.holdings import Pair
from cost_models.machine import Machine
from cost_models.reallocation import reallocation_time, reallocation_traffic
from plans.cluster import ClusterSpec, DeviceMesh, all_meshes
from plans.layout import Layout
from plans.library import load_cluster, load_model
from plans.model import ModelSpec
from plans.reallocation import reallocation
from plans.strategy import ParallelStrategy


def tiny(**changes: object) -> ModelSpec:
    sizes: dict[str, object] = dict(layers=4, hidden=32, heads=8, kv_heads=8, head_dim=4, ffn=48, vocab=256)
    return ModelSpec(name="tiny", **(sizes | changes))  # type: ignore[arg-type]


def layouts(cluster: ClusterSpec) -> list[Pair]:
    pairs = []
    for mesh in all_meshes(cluster):
        for tp, pp, vpp in itertools.product((1, 2, 4), (1, 2, 4), (1, 2)):
            fits = mesh.size % (tp * pp) == 0 and tp <= mesh.gpus and 4 % (pp * vpp) == 0
            if fits and (vpp == 1 or pp > 1):
                pairs.append((mesh, ParallelStrategy(dp=mesh.size // (tp * pp), tp=tp, pp=pp, vpp=vpp)))
    return pairs


def machine_of(cluster: ClusterSpec) -> Machine:
    return Machine(cluster, load_engine("megatron", cluster.gpu.name))


@pytest.mark.parametrize(
    "spec",
    [tiny(), tiny(tied_embeddings=True), tiny().with_value_head()],
    ids=["untied", "tied", "value"],
)
def test_bytes_equal_the_listed_transfers(spec: ModelSpec) -> None:
    cluster = load_cluster("a100-80gb", gpus=12, gpus_per_node=4)
    generator = random.Random(1)
    sources, targets = generator.sample(layouts(cluster), 14), generator.sample(layouts(cluster), 14)
    moved = reallocation_traffic(machine_of(cluster), spec, sources, targets)
    for (i, source), (j, target) in itertools.product(enumerate(sources), enumerate(targets)):
        listed = reallocation(Layout.of(spec, *source, cluster), Layout.of(spec, *target, cluster), 4).transfers
        assert moved.received[i, j] == pytest.approx(sum(t.elements for t in listed), abs=0.5)
        across = [t for t in listed if t.source // 4 != t.target // 4]
        assert moved.network[i, j] == pytest.approx(sum(t.elements for t in across), abs=0.5), (source, target)


def test_nothing_moves_between_equal_layouts() -> None:
    cluster = load_cluster("a100-80gb", gpus=8, gpus_per_node=4)
    pairs = layouts(cluster)
    seconds = reallocation_time(machine_of(cluster), tiny(), pairs, pairs)
    assert np.all(np.diag(seconds) == 0)
    assert np.all(seconds >= 0)


def test_seventy_billion_takes_its_bytes_over_the_network() -> None:
    cluster = load_cluster("a100-80gb", gpus=16)
    spec = load_model("llama-70b")
    first = (DeviceMesh(first_node=0, nodes=1, first_gpu=0, gpus=8), ParallelStrategy(tp=8))
    second = (DeviceMesh(first_node=1, nodes=1, first_gpu=0, gpus=8), ParallelStrategy(tp=8))
    machine = machine_of(cluster)
    seconds = reallocation_time(machine, spec, [first], [second])[0, 0]
    least = spec.params * 2 / (8 * machine.network_bytes_per_s)
    assert least < seconds < 1.2 * least


def test_forty_thousand_pairs_in_seconds() -> None:
    cluster = load_cluster("a100-80gb", gpus=128)
    generator = random.Random(0)
    meshes = [mesh for mesh in all_meshes(cluster) if mesh.size >= 8]
    pairs = []
    while len(pairs) < 200:
        mesh, tp, pp = generator.choice(meshes), generator.choice((1, 2, 4, 8)), generator.choice((1, 2, 4, 8))
        if mesh.size % (tp * pp) == 0:
            pairs.append((mesh, ParallelStrategy(dp=mesh.size // (tp * pp), tp=tp, pp=pp)))
    started = time.perf_counter()
    seconds = reallocation_time(machine_of(cluster), load_model("llama-70b"), pairs, pairs)
    assert seconds.shape == (200, 200)
    assert time.perf_counter() - started < 6.0
