"""Weights between machines: bytes over the network and time, against one copy per machine at the link's speed.

    bench_network.py [--mbit 200] [--layers 4] [--hidden 512] [--repeats 3]

Two machines of two ranks each, network namespaces of this one, whose links `tc` limits (needs root). A layout on the
first machine becomes one on the second or on both. The bytes are those that the kernel has counted at the second
machine's interface; the fewest are one copy of the model, however many ranks there need it. An Ethernet frame of
1,514 bytes has 1,448 of content, so that the link itself takes 1.05 of the time that the content alone would.

The last row is the start of a run whose second machine has not the folder of the weights: all its ranks hold a replica.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing as mp
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from gpu_check.plays import fixture_plan
from rich.console import Console
from rich.table import Table

from plans.layout import Layout, model_units
from plans.model import ModelSpec
from plans.plan import ExecutionPlan
from plans.runfile import RunFile
from runtime.groups import GroupCache
from runtime.machines.files import FileServer
from runtime.machines.weights import WeightFolders
from runtime.models.installation import install
from runtime.models.model import build_model, named_shards
from runtime.weights.hf import random_parameter
from runtime.weights.hf_folder import write_folder
from runtime.weights.reallocate import Reallocator

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from machines import Machine, machines

NODES, PER_NODE = 2, 2
RANKS = NODES * PER_NODE
CLONE_NEWNET = 0x40000000
BAR = 1.15
FIRST, SECOND, BOTH = (0, 1), (2, 3), (0, 1, 2, 3)
Place = tuple[tuple[int, ...], dict[str, int]]
PAIRS: Mapping[str, tuple[Place, Place]] = {
    "tp2 -> dp2 on the other": ((FIRST, {"tp": 2}), (SECOND, {"dp": 2})),
    "dp2 -> tp2 on the other": ((FIRST, {"dp": 2}), (SECOND, {"tp": 2})),
    "pp2 -> dp4 on both": ((FIRST, {"pp": 2}), (BOTH, {"dp": 4})),
    "dp2 -> dp2 tp2 on both": ((FIRST, {"dp": 2}), (BOTH, {"dp": 2, "tp": 2})),
}


def main() -> int:
    """Measure, and print a table; fails where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=int, default=200, help="speed of every link, megabits per second")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    spec = bench_spec(options.layers, options.hidden)
    copy, missed = copy_bytes(spec), 0
    table = Table("from the first machine", "MB over the link", "copies", "s", "of the link's", "bar")
    figures = measured(spec, options.mbit, options.repeats) | {"a folder -> dp4 on both": loaded(spec, options.mbit)}
    for name, (received, seconds) in figures.items():
        ratio = seconds / (copy * 8 / (options.mbit * 1e6))
        missed += ratio > BAR
        table.add_row(
            name, f"{received / 1e6:.1f}", f"{received / copy:.3f}", f"{seconds:.2f}", f"{ratio:.3f}", f"<= {BAR}"
        )
    Console().print(table)
    return int(missed > 0)


def bench_spec(layers: int, hidden: int) -> ModelSpec:
    """A Llama of a size."""
    return ModelSpec(
        name="bench", layers=layers, hidden=hidden, heads=hidden // 64, kv_heads=hidden // 128, head_dim=64,
        ffn=hidden * 8 // 3 // 64 * 64, vocab=8192,
    )  # fmt: skip


def copy_bytes(spec: ModelSpec) -> int:
    """Bytes of one float32 copy of a model."""
    return 4 * sum(parameter.size for unit in model_units(spec) for parameter in unit.parameters)


def measured(spec: ModelSpec, mbit: int = 0, repeats: int = 1) -> dict[str, tuple[float, float]]:
    """For every pair of layouts the bytes that have come to the second machine and the seconds from barrier to
    barrier, medians. mbit: speed of the links; 0: as fast as they are. Raises AssertionError where a rank fails or has
    wrong weights afterwards."""
    context = mp.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder, machines(NODES) as found:
        for machine in found if mbit else ():
            machine.limit(mbit)
        ranks = [
            context.Process(target=_rank, args=(rank, found[rank // PER_NODE], folder, spec, repeats, send))
            for rank in range(RANKS)
        ]
        try:
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
        finally:
            for process in ranks:
                process.kill()
    assert not any(process.exitcode for process in ranks), "a rank failed"
    figures: dict[str, tuple[float, float]] = receive.recv()
    return figures


def loaded(spec: ModelSpec, mbit: int = 0) -> tuple[float, float]:
    """The same for the weights of a folder that is on the first machine alone."""
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder, machines(NODES) as found:
        for machine in found if mbit else ():
            machine.limit(mbit)
        weights, (ours, theirs) = Path(folder) / "weights", context.Pipe()
        parameters = (p for unit in model_units(spec) for p in unit.parameters)
        write_folder(spec, torch.float32, ((p, random_parameter(spec, p, 0)) for p in parameters), weights)
        plan = fixture_plan("sft", RANKS, nodes=NODES, spec=spec)
        run = RunFile(weights=str(weights), output=f"{folder}/out")
        ends = [context.Process(target=_serve, args=(found[0], run, theirs)),
                context.Process(target=_load, args=(found[1], plan, run, ours))]  # fmt: skip
        try:
            for process in ends:
                process.start()
            ends[1].join()
            assert not ends[1].exitcode, "the weights have not come"
            figures: tuple[float, float] = theirs.recv()
        finally:
            for process in ends:
                process.kill()
    return figures


def _serve(machine: Machine, run: RunFile, end: Connection) -> None:
    _enter(machine)
    files = FileServer(machine.address, Path(run.output))
    end.send((WeightFolders(run, files, 0).describe()["folders"], files.source))
    time.sleep(3600)


def _load(machine: Machine, plan: ExecutionPlan, run: RunFile, end: Connection) -> None:
    _enter(machine)
    folders, source = end.recv()
    wanted = {number: folder | {"sources": [source]} for number, folder in folders.items()}
    came, began = _received(), time.perf_counter()
    WeightFolders(run, FileServer(machine.address, Path(run.output)), 1).fetch(plan, SECOND, wanted)
    end.send((_received() - came, time.perf_counter() - began))


def _enter(machine: Machine) -> None:
    with open(f"/run/netns/{machine.name}", "rb") as namespace:
        assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET) == 0, os.strerror(
            ctypes.get_errno()
        )


def _rank(rank: int, machine: Machine, folder: str, spec: ModelSpec, repeats: int, result: Any) -> None:
    torch.set_num_threads(1)
    _enter(machine)
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    install(torch.device("cpu"))
    groups, mover = GroupCache(torch.device("cpu")), Reallocator(gpus_per_node=PER_NODE)
    figures = {}
    for name, places in PAIRS.items():
        source, target = (Layout(spec, ranks, **degrees) for ranks, degrees in places)
        figures[name] = _moved(groups, mover, source, target, repeats)
    if rank == RANKS - 1:  # of the second machine
        result.send(figures)
    dist.barrier()
    dist.destroy_process_group()


def _moved(groups: GroupCache, mover: Reallocator, source: Layout, target: Layout, repeats: int) -> tuple[float, float]:
    """Bytes received by this rank's machine, and seconds."""
    have, want = _shards(groups, source), _shards(groups, target)
    for number, tensor in enumerate(have.values()):
        tensor.fill_(number + 1.0)
    found = []
    for _ in range(repeats + 1):  # the first call plans and opens connections
        for tensor in want.values():
            tensor.zero_()
        came = _received()  # before anyone sends
        dist.barrier()
        began = time.perf_counter()
        mover.run(source, target, have, want)
        dist.barrier()
        longest = torch.tensor(time.perf_counter() - began)  # of the rank that began first
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        found.append((_received() - came, float(longest)))
    assert all(bool((tensor > 0).all()) for tensor in want.values()), "weights did not come"
    received, seconds = zip(*found[1:], strict=True)
    return median(received), median(seconds)


def _shards(groups: GroupCache, layout: Layout) -> dict[str, torch.Tensor]:
    collection = groups.collection(layout)
    if collection is None:
        return {}
    model = build_model(layout, collection, device=torch.device("cpu"))
    return {known.name: held.data for known, held in named_shards(model)}


def _received() -> int:
    """Bytes that have come to this machine from others; what its ranks say to each other goes over loopback."""
    text = Path("/proc/thread-self/net/dev").read_text()
    line = next(line for line in text.splitlines() if line.strip().startswith("eth0:"))
    return int(line.split(":")[1].split()[0])


if __name__ == "__main__":
    raise SystemExit(main())
