"""Worlds of one or two ranks on the one device, each rank a process of its own."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from gpu_check.setting import Setting

TIMEOUT = timedelta(seconds=300)
"""Of collectives: long, because the stage has its own limit and rehearsals run on busy machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Ranks on a kind of device.

    backend: of tensors on the device; `staged` sends messages through host memory. spawns: its processes start afresh,
    as they must where the process that starts them has touched CUDA.
    """

    ranks: int
    kind: str
    backend: str
    staged: bool = False
    spawns: bool = False


GRACE_S = 3.0


class RankFailed(RuntimeError):
    """A rank that raised or died."""


def world_of(setting: Setting, ranks: int) -> World:
    """Ranks on the setting's device: one rank with the device's own backend, two with the chosen one."""
    own = "nccl" if setting.kind == "cuda" else "gloo"
    backend = own if ranks == 1 or setting.kind == "cpu" else setting.backend
    staged = ranks > 1 and backend == "gloo"
    return World(ranks=ranks, kind=setting.kind, backend=backend, staged=staged, spawns=setting.kind == "cuda")


def reference_world(setting: Setting) -> World:
    """One rank of the CPU."""
    return World(ranks=1, kind="cpu", backend="gloo", spawns=setting.kind == "cuda")


def run_world(world: World, function: Callable[..., Any], *words: Any, may_die: bool = False) -> list[Any]:
    """Results of `function(device, groups, *words)` by rank; None of a rank that died, where it may.

    `function` is a module's own, because processes are spawned where there is CUDA.
    """
    # On the CPU the ranks of a rehearsal take over what the stage has imported.
    context = multiprocessing.get_context("spawn" if world.spawns else "fork")
    from runtime.processes.failures import lost_peer

    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        pipes, processes = [], []
        for rank in range(world.ranks):
            receive, send = context.Pipe()
            process = context.Process(target=_rank, args=(world, rank, store, os.getpid(), send, function, words))
            process.start()
            send.close()
            pipes.append(receive)
            processes.append(process)
        try:
            found = _collect(pipes, processes, may_die)
        finally:  # only now, because a rank that ends takes its connections from those that still work
            for process in processes:
                process.kill()
                process.join()
    errors = [error for error, _ in found if error]
    if errors:
        raise RankFailed(min(errors, key=lost_peer))  # who lost a peer knows no cause
    return [value for _, value in found]


def run_worlds(*jobs: tuple[Any, ...]) -> list[list[Any]]:
    """Several worlds (world, function, words ...) side by side."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda job: run_world(*job), jobs))


def _collect(pipes: list[Any], processes: list[Any], may_die: bool) -> list[tuple[str, Any]]:
    """Error and result of every rank. After the first error the others have a moment to say what they know."""
    found: dict[int, tuple[str, Any]] = {}
    failed = False
    while len(found) < len(pipes):
        left = [rank for rank in range(len(pipes)) if rank not in found]
        # Forks of other worlds may hold a pipe's other end, so a death shows at the process.
        ready = wait(
            [end for rank in left for end in (pipes[rank], processes[rank].sentinel)], GRACE_S if failed else None
        )
        if not ready:
            return [found.get(rank, ("", None)) for rank in range(len(pipes))]
        for rank in left:
            if pipes[rank] in ready or processes[rank].sentinel in ready:
                found[rank] = _receive(pipes[rank], rank, processes[rank], may_die)
                failed |= bool(found[rank][0])
    return [found[rank] for rank in range(len(pipes))]


def _receive(pipe: Any, rank: int, process: Any, may_die: bool) -> tuple[str, Any]:
    try:
        error, value = pipe.recv() if pipe.poll() else (None, None)
    except EOFError:
        error, value = None, None
    if error is None:
        process.join(GRACE_S)
        return "" if may_die else f"rank {rank} died with exit code {process.exitcode}", None
    return error and f"rank {rank}: {error}", value


def _rank(
    world: World, rank: int, store: str, parent: int, pipe: Any, function: Callable[..., Any], words: tuple[Any, ...]
) -> None:
    if world.kind == "cpu" and world.spawns:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: the reference knows of no card
    faulthandler.enable()  # a crash below Python shows in the stage's log where it was
    import torch
    import torch.distributed as dist

    from gpu_check.staging import stage_messages
    from runtime.groups import GroupCache
    from runtime.launching.entry import die_with
    from runtime.models.installation import install

    die_with(parent)
    # A fork must not destroy what it inherits: a process group's destructor waits for threads that stayed behind.
    gc.freeze()
    try:
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")
        device = torch.device("cuda", 0) if world.kind == "cuda" else torch.device("cpu")
        install(device)
        if world.staged:
            stage_messages()
        files = dist.FileStore(store, world.ranks)
        backend = f"cpu:gloo,cuda:{world.backend}" if world.kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=files, rank=rank, world_size=world.ranks, timeout=TIMEOUT)
        result = function(device, GroupCache(device, TIMEOUT, world.backend), *words)
        pipe.send(("", result))
    except BaseException as error:
        traceback.print_exc()
        pipe.send((f"{type(error).__name__}: {error}", None))
    with suppress(EOFError):
        pipe.recv()  # until it is killed
