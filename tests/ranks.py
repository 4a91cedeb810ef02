"""Run a function on forked gloo ranks: imports happen once in the parent, so a world starts in under a second."""

from __future__ import annotations

import multiprocessing as mp
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch.optim imports it, seconds of work: here once instead of on every rank
import torch.distributed as dist


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


def _rank_main(
    rank: int, world: int, store: str, timeout_s: float, pipe: Connection, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(store, world),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
        )
        result = fn(*args)
        _assert_no_global_groups()
        pipe.send_bytes(pickle.dumps((True, result)))
        dist.barrier()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    pipe.close()


def _assert_no_global_groups() -> None:
    """Megatron's global groups must stay uninitialised, so that code which forgets its own groups fails."""
    state = sys.modules.get("megatron.core.parallel_state")
    assert state is None or not state.is_initialized(), "something initialised megatron's parallel_state"


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
    """Results of `fn(*args)` on `world` ranks, by rank. `fn` may be a closure; results must pickle.

    Raises RankError with the traceback of the first rank that fails, TimeoutError when ranks hang; kills the rest.
    """
    fork = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        pipes: dict[Connection, int] = {}
        processes = []
        for rank in range(world):
            receive, send = fork.Pipe(duplex=False)
            process = fork.Process(target=_rank_main, args=(rank, world, store, timeout, send, fn, args), daemon=True)
            process.start()
            send.close()
            processes.append(process)
            pipes[receive] = rank
        try:
            results = _collect(pipes, time.monotonic() + timeout)
            for process in processes:
                process.join(5)
        finally:
            for process in processes:
                process.kill()
                process.join()
    return [results[rank] for rank in range(world)]


def _collect(pipes: dict[Connection, int], deadline: float) -> dict[int, Any]:
    results: dict[int, Any] = {}
    while pipes:
        ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(pipes.values())} did not finish")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.pop(pipe)
            try:
                good, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                good, value = False, "the process died"
            if not good:
                raise RankError(f"rank {rank}:\n{value}")
            results[rank] = value
    return results
