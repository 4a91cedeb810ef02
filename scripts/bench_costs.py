"""Costs per second: every call of a PPO workload under many random layouts, vectorised.

python scripts/bench_costs.py [--layouts 20000] [--seconds 5]
"""

from __future__ import annotations

import argparse
import random
import time

from cost_models.candidates import Candidates
from cost_models.engines.engine import MEGATRON
from cost_models.time.calls import call_time
from plans.algorithms import ppo
from plans.cluster import ClusterSpec, DeviceMesh, GpuSpec
from plans.model import ModelSpec
from plans.strategy import ParallelStrategy, Recompute
from plans.workload import Workload

GPU = GpuSpec(
    name="h100-80gb-sxm", memory_gib=79.1, bf16_tflops=989, fp32_tflops=67, hbm_gbps=3350, link_gbps=450, pcie_gbps=55
)
MODEL = ModelSpec(name="llama2-70b", layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672, vocab=32000)


def random_layout(generator: random.Random, nodes: int) -> tuple[DeviceMesh, ParallelStrategy]:
    """A layout of 8 to 8 x nodes GPUs with random degrees."""
    count = 2 ** generator.randrange(nodes.bit_length())
    tp, pp = 2 ** generator.randrange(4), 2 ** generator.randrange(4)
    size = count * 8
    pp = min(pp, size // tp)
    strategy = ParallelStrategy(
        dp=size // (tp * pp),
        tp=tp,
        pp=pp,
        micro_batches=2 ** generator.randrange(5),
        groups=pp,
        sequence_parallel=tp > 1,
        recompute=generator.choice(list(Recompute)),
    )
    return DeviceMesh(first_node=0, nodes=count, first_gpu=0, gpus=8), strategy


def main() -> None:
    """Print costs per second by call and over all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    cluster = ClusterSpec(nodes=16, gpus_per_node=8, gpu=GPU, inter_node_gbps=50)
    graph = ppo()
    workload = Workload(graph=graph, models=dict.fromkeys(graph.roles, MODEL))
    machine = MEGATRON.on(cluster, workload.dtype)
    generator = random.Random(0)
    candidates = Candidates.of([random_layout(generator, cluster.nodes) for _ in range(args.layouts)])
    costs, spent = 0, 0.0
    per_call: dict[str, float] = {call.name: 0.0 for call in graph.model_calls}
    while spent < args.seconds:
        for name in per_call:
            started = time.perf_counter()
            call_time(machine, workload, name, candidates).total_s.sum()
            per_call[name] += time.perf_counter() - started
        costs += len(per_call) * len(candidates)
        spent = sum(per_call.values())
    rounds = costs // (len(per_call) * len(candidates))
    for name, seconds in per_call.items():
        print(f"{name:16s} {rounds * len(candidates) / seconds:12,.0f} costs/s")
    print(f"{'all':16s} {costs / spent:12,.0f} costs/s")


if __name__ == "__main__":
    main()
