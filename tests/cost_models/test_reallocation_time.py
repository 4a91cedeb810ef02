"""Closed-form reallocation traffic against the transfers that `plans.reallocation` lists."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from dataclasses import dataclass, field, fields, replace

import numpy as np
import pytest
from plan_cases import all_meshes

from cost_models.engines.engine import MEGATRON
from cost_models.engines.machine import Machine
from cost_models.reallocation import Traffic, reallocation_matrix, reallocation_time, traffic_in_parts, transfer_time
from cost_models.relations import Relations
from plans.cluster import ClusterSpec
from plans.layout import Layout
from plans.library import load_cluster, load_model
from plans.lora import Lora
from plans.model import ModelSpec
from plans.reallocation import reallocation
from plans.strategy import ParallelStrategy


def tiny(**changes: object) -> ModelSpec:
    sizes: dict[str, object] = {"layers": 4, "hidden": 48, "heads": 12, "kv_heads": 12, "ffn": 48, "vocab": 384}
    return ModelSpec(name="tiny", head_dim=4, **(sizes | changes))  # type: ignore[arg-type]


@dataclass
class Listed:
    """Elements of the transfers that `plans.reallocation` lists: received and sent inside a node by rank, arrived over
    the network by node."""

    received: Counter[int] = field(default_factory=Counter)
    relayed: Counter[int] = field(default_factory=Counter)
    arrived: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, source: Layout, target: Layout, per_node: int) -> Listed:
        listed = cls()
        for transfer in reallocation(source, target, per_node).moves:
            listed.received[transfer.target] += transfer.elements
            if transfer.source // per_node == transfer.target // per_node:
                listed.relayed[transfer.source] += transfer.elements
            else:
                listed.arrived[transfer.target // per_node] += transfer.elements
        return listed


def reallocation_traffic(cluster: ClusterSpec, sources: list[Layout], targets: list[Layout]) -> Traffic:
    """What moves between every source and target layout."""
    relations = Relations.of(sources, targets, cluster.gpus_per_node)
    parts = [moved for _, moved in traffic_in_parts(targets[0].spec, relations)]
    whole = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Traffic)}
    return Traffic(**{name: relations.spread(figure) for name, figure in whole.items()})


def layouts(cluster: ClusterSpec, spec: ModelSpec) -> list[Layout]:
    found = []
    for mesh in all_meshes(cluster):
        for tp, pp, vpp in itertools.product((1, 2, 3, 4, 6), (1, 2, 4), (1, 2)):
            fits = mesh.size % (tp * pp) == 0 and mesh.gpus % tp == 0 and 4 % (pp * vpp) == 0
            for ep in (1, 2, 4) if spec.experts else (1,):
                if fits and (vpp == 1 or pp > 1) and mesh.size // pp % ep == 0:
                    strategy = ParallelStrategy(dp=mesh.size // (tp * pp), tp=tp, pp=pp, vpp=vpp, ep=ep)
                    found.append(Layout.of(spec, mesh, strategy, cluster))
    return found


def machine_on(cluster: ClusterSpec) -> Machine:
    return MEGATRON.on(cluster, "bf16")


@pytest.mark.parametrize(
    "spec",
    [
        tiny(),
        tiny(tied_embeddings=True),
        tiny().with_value_head(),
        tiny(experts=8, experts_per_token=2, ffn=12),
        tiny(lora=Lora(4, targets=("linear_qkv", "linear_fc2"))),
    ],
    ids=["untied", "tied", "value", "experts", "adapters"],
)
@pytest.mark.parametrize("per_node", [4, 6])
def test_bytes_equal_the_listed_transfers(spec: ModelSpec, per_node: int) -> None:
    cluster = load_cluster("a100-80gb", gpus=3 * per_node, gpus_per_node=per_node)
    generator = random.Random(1)
    sources, targets = (generator.sample(layouts(cluster, spec), 14) for _ in range(2))
    moved = reallocation_traffic(cluster, sources, targets)
    for (i, source), (j, target) in itertools.product(enumerate(sources), enumerate(targets)):
        listed = Listed.of(source, target, per_node)
        assert moved.received[i, j] == sum(listed.received.values()), (source, target)
        assert moved.network[i, j] == sum(listed.arrived.values()), (source, target)
        assert moved.rank_peak[i, j] >= max(listed.received.values(), default=0)
        nodes = len({rank // per_node for rank in source.ranks})
        balanced = sum(listed.arrived.values()) / nodes
        assert moved.node_peak[i, j] == max(balanced, max(listed.arrived.values(), default=0))


def test_bytes_of_experts_under_uneven_stages_equal_the_listed_transfers() -> None:
    cluster, spec = load_cluster("a100-80gb", gpus=12, gpus_per_node=6), tiny(layers=7, experts=6, experts_per_token=2)
    generator, found = random.Random(4), []
    for mesh in all_meshes(cluster):
        for tp, pp, ep in itertools.product((1, 2, 3), (1, 2, 3, 4, 6), (1, 2, 3, 6)):
            if mesh.size % (tp * pp) == 0 and mesh.gpus % tp == 0 and mesh.size // pp % ep == 0:
                strategy = ParallelStrategy(dp=mesh.size // (tp * pp), tp=tp, pp=pp, ep=ep)
                found.append(Layout.of(spec, mesh, strategy, cluster))
                split = (*itertools.repeat(1, pp - 1), 8 - pp)
                found.append(Layout.of(spec, mesh, replace(strategy, layers_per_stage=split), cluster))
    sources, targets = (generator.sample(found, 14) for _ in range(2))
    moved = reallocation_traffic(cluster, sources, targets)
    for (i, source), (j, target) in itertools.product(enumerate(sources), enumerate(targets)):
        listed = Listed.of(source, target, 6)
        assert moved.received[i, j] == sum(listed.received.values()), (source, target)
        assert moved.network[i, j] == sum(listed.arrived.values()), (source, target)
        assert moved.rank_peak[i, j] >= max(listed.received.values(), default=0)


def test_the_busiest_rank_is_that_of_the_listed_transfers() -> None:
    cluster = load_cluster("a100-80gb", gpus=12, gpus_per_node=4)
    generator = random.Random(2)
    found = layouts(cluster, tiny(layers=32))
    sources, targets = (generator.sample(found, 12) for _ in range(2))
    moved = reallocation_traffic(cluster, sources, targets)
    ratios = []
    for (i, source), (j, target) in itertools.product(enumerate(sources), enumerate(targets)):
        listed = Listed.of(source, target, 4)
        busiest = max([*listed.received.values(), *listed.relayed.values()], default=0)
        assert (moved.rank_peak[i, j] == 0) == (busiest == 0)
        ratios += [moved.rank_peak[i, j] / busiest] if busiest else []
    assert np.quantile(ratios, 0.2) > 0.95
    assert max(ratios) < 1.05


def test_one_pair_costs_what_it_costs_among_many() -> None:
    cluster = load_cluster("a100-80gb", gpus=24, gpus_per_node=6)
    generator = random.Random(3)
    sources, targets = (generator.sample(layouts(cluster, tiny()), 20) for _ in range(2))
    matrix = reallocation_matrix(machine_on(cluster), sources, targets)
    for (i, source), (j, target) in itertools.product(enumerate(sources), enumerate(targets)):
        assert reallocation_time(machine_on(cluster), [(source, target)])[0] == matrix[i, j]


def test_nothing_moves_between_equal_layouts() -> None:
    cluster = load_cluster("a100-80gb", gpus=8, gpus_per_node=4)
    found = layouts(cluster, tiny())
    seconds = reallocation_matrix(machine_on(cluster), found, found)
    assert np.all(np.diag(seconds) == 0)
    assert np.all(seconds >= 0)


def test_seventy_billion_takes_its_bytes_over_the_network() -> None:
    cluster = load_cluster("a100-80gb", gpus=16)
    spec = load_model("llama-70b")
    first, second = Layout(spec, tuple(range(8)), tp=8), Layout(spec, tuple(range(8, 16)), tp=8)
    machine = machine_on(cluster)
    seconds = reallocation_time(machine, [(first, second)])[0]
    least = spec.params * 2 / (8 * machine.network_bytes_per_s)
    assert least < seconds < 1.2 * least


def test_a_quarter_million_pairs_on_a_thousand_gpus() -> None:
    cluster = load_cluster("a100-80gb", gpus=1024)
    generator = random.Random(0)
    meshes = [mesh for mesh in all_meshes(cluster) if mesh.size >= 8]
    spec = load_model("llama-70b")
    found: list[Layout] = []
    while len(found) < 500:
        mesh, tp, pp = generator.choice(meshes), generator.choice((1, 2, 4, 8)), generator.choice((1, 2, 4, 5, 8, 80))
        if mesh.size % (tp * pp) == 0:
            strategy = ParallelStrategy(dp=mesh.size // (tp * pp), tp=tp, pp=pp)
            found.append(Layout.of(spec, mesh, strategy, cluster))
    started = time.process_time()
    seconds = reallocation_matrix(machine_on(cluster), found, found)
    assert seconds.shape == (500, 500)
    assert time.process_time() - started < 4.0


def test_transfer_waits_for_the_busiest_rank() -> None:
    cluster = load_cluster("a100-80gb", gpus=16)
    machine = machine_on(cluster)
    inside = transfer_time(machine, [(0, 1), (2, 3)], [1e9, 1e9])
    assert inside == pytest.approx(machine.constants.message_s + 1e9 / machine.link_bytes_per_s)
    across = transfer_time(machine, [(0, 8), (1, 8)], [1e9, 1e9])
    assert across == pytest.approx(2 * (machine.constants.message_s + 1e9 / machine.network_bytes_per_s))
    assert transfer_time(machine, [], []) == 0.0
