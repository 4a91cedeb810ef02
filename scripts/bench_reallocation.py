"""Reallocation against Megatron-core's own `swap_model_weights`: ten pairs of layouts, both sides in one run.

    bench_reallocation.py [--only 3 7 ...] [--repeats 5] [--layers 6] [--hidden 768]

Four ranks on this machine, over gloo, fp32. For every pair: seconds from barrier to barrier and CPU seconds of all
ranks together (medians; an idle machine tells more by the first, a busy one by the second), and the bytes that ours
sends, which are the fewest there can be. The first call of either side, in which it plans, does not count.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plans.layout import Layout
from plans.model import ModelSpec
from plans.strategy import Recompute
from runtime.groups import GroupCache
from runtime.models.installation import install
from runtime.models.model import Model, build_model, named_shards, transformer_config
from runtime.weights.reallocate import Reallocator

CPU, RANKS = torch.device("cpu"), 4
LOW, HIGH, ALL = (0, 1), (2, 3), (0, 1, 2, 3)
Place = tuple[tuple[int, ...], dict[str, int]]
PAIRS: dict[str, tuple[Place, Place]] = {
    "tp2 -> dp2": ((LOW, {"tp": 2}), (LOW, {"dp": 2})),
    "pp2 -> dp2": ((LOW, {"pp": 2}), (LOW, {"dp": 2})),
    "tp2 -> pp2": ((LOW, {"tp": 2}), (LOW, {"pp": 2})),
    "dp2 tp2 -> pp4": ((ALL, {"dp": 2, "tp": 2}), (ALL, {"pp": 4})),
    "tp2 pp2 -> dp4": ((ALL, {"tp": 2, "pp": 2}), (ALL, {"dp": 4})),
    "dp4 -> tp2 pp2": ((ALL, {"dp": 4}), (ALL, {"tp": 2, "pp": 2})),
    "tp2 pp2 -> dp2 tp2": ((ALL, {"tp": 2, "pp": 2}), (ALL, {"dp": 2, "tp": 2})),
    "disjoint tp2 -> pp2": ((LOW, {"tp": 2}), (HIGH, {"pp": 2})),
    "partial pp2 -> tp2": ((LOW, {"pp": 2}), ((1, 2), {"tp": 2})),
    "pp4 -> one": ((ALL, {"pp": 4}), ((0,), {})),
}


def main() -> None:
    """Play the pairs and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", default=list(range(len(PAIRS))), help="numbers of pairs, from 0")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=768)
    options = parser.parse_args()
    spec = ModelSpec(
        name="bench", layers=options.layers, hidden=options.hidden, heads=options.hidden // 64,
        kv_heads=options.hidden // 192, head_dim=64, ffn=options.hidden * 8 // 3 // 64 * 64, vocab=16384,
    )  # fmt: skip
    print(f"{spec.name}: {spec.layers} layers of {spec.hidden}; ours, then Megatron-core", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("fork")
        ranks = []
        for rank in range(RANKS):
            process = context.Process(target=_rank, args=(rank, folder, spec, options.only, options.repeats))
            process.start()
            ranks.append(process)
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit("a rank failed")


def _rank(rank: int, folder: str, spec: ModelSpec, only: list[int], repeats: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    install(CPU)
    groups = GroupCache(CPU)
    for number, (name, (source, target)) in enumerate(PAIRS.items()):
        if number in only:
            line = _compare(groups, *(Layout(spec, ranks, **degrees) for ranks, degrees in (source, target)), repeats)
            if rank == 0:
                print(f"{name:20} {line}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


class _Nothing(nn.Module):
    """What Megatron wants of a rank outside a layout."""

    def __init__(self, config: Any, groups: Any) -> None:
        super().__init__()
        self.config, self.pg_collection = config, groups


def _compare(groups: GroupCache, source: Layout, target: Layout, repeats: int) -> str:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.resharding import refit

    def chunk(layout: Layout) -> tuple[Model | None, Any]:
        collection = groups.collection(layout)
        if collection is None:
            absent = ProcessGroupCollection(dp=dist.group.WORLD if layout is source else None)
            return None, _Nothing(transformer_config(layout, torch.float32, False, Recompute.NONE), absent)
        model = build_model(layout, collection, device=CPU)
        for number, parameter in enumerate(model.chunks[0].parameters()):
            parameter.requires_grad_(False).fill_(float(number))
        model.chunks[0].pg_collection = collection
        return model, model.chunks[0]

    (mine, have), (theirs, want) = chunk(source), chunk(target)
    mover = Reallocator(gpus_per_node=RANKS)
    sides: list[Callable[[], object]] = [
        lambda: mover.run(source, target, _shards(mine), _shards(theirs)),
        lambda: refit.swap_model_weights(have, want, "gloo"),
    ]
    times: list[list[tuple[float, float]]] = [[], []]
    for turn in range(repeats + 1):
        for side, found in zip(sides, times, strict=True):
            figures = _timed(side)
            if turn:
                found.append(figures)
    (wall, cpu), (other_wall, other_cpu) = ([median(x) for x in zip(*found, strict=True)] for found in times)
    moved = mover.plan(source, target).elements * 4 / 1e6
    return (
        f"{wall * 1e3:7.0f} ms and {other_wall * 1e3:7.0f} ms, {wall / other_wall:5.2f} x;"
        f" CPU {cpu * 1e3:7.0f} ms and {other_cpu * 1e3:7.0f} ms, {cpu / other_cpu:5.2f} x; {moved:6.1f} MB"
    )


def _shards(model: Model | None) -> dict[str, Tensor]:
    return {} if model is None else {known.name: held.data for known, held in named_shards(model)}


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds from barrier to barrier, and CPU seconds of all ranks."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    dist.barrier()
    spent = torch.tensor([time.process_time() - cpu], dtype=torch.float64)
    wall = time.perf_counter() - wall
    dist.all_reduce(spent)
    return wall, float(spent)


if __name__ == "__main__":
    main()
