"""Vectorised costs are as many per second as a search needs."""

from __future__ import annotations

import time

import pytest

from cost_models.candidates import Candidates
from cost_models.engines.engine import MEGATRON
from cost_models.time.calls import call_time
from plans.algorithms import ppo
from plans.library import load_cluster, load_model
from plans.strategy import ParallelStrategy
from plans.workload import Workload


@pytest.mark.parametrize("call", ["actor_generate", "ref_infer", "actor_train"])
def test_half_a_million_costs_per_second(call: str) -> None:
    cluster = load_cluster("h100-80gb-sxm", gpus=128)
    graph, machine = ppo(), MEGATRON.on(cluster, "bf16")
    workload = Workload(graph=graph, models=dict.fromkeys(graph.roles, load_model("llama-70b")))
    strategies = [ParallelStrategy(dp=128 // (t * p), tp=t, pp=p, groups=p) for t in (1, 2, 4, 8) for p in (1, 2, 4, 8)]
    candidates = Candidates.of([(cluster.whole, s) for s in strategies] * 1000)
    best = float("inf")
    for _ in range(8):
        started = time.process_time()
        call_time(machine, workload, call, candidates)
        best = min(best, time.process_time() - started)
    assert len(candidates) / best >= 500_000
