"""Processes of ranks: how they start and how they end. Light: the launcher needs neither torch nor megatron for it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
from multiprocessing import forkserver
from pathlib import Path
from threading import Thread

from plans.plan import ExecutionPlan
from plans.runfile import RunFile


def start_method(plan: ExecutionPlan) -> str:
    """On the CPU a server imports torch and megatron once and forks the ranks; CUDA does not survive a fork."""
    return "forkserver" if plan.cluster.gpu.name == "cpu" else "spawn"


def prepare_ranks(plan: ExecutionPlan) -> None:
    """Set what torch and the ranks read from the environment, where the user has not, and start the fork server, which
    imports while the launcher does. A second call does nothing."""
    defaults = {
        # The agents' store outlives the workers'; sharing it breaks the next rendezvous.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    forks = start_method(plan) == "forkserver"
    if forks:
        # Threads that wait for each other's cores burn several times the time that they save.
        defaults["OMP_NUM_THREADS"] = "1"
        # glibc keeps freed activations instead of giving their pages back to the system and faulting them in again:
        # 17 % of a training step of SmolLM2-135M with 8 micro-batches. 32 MiB is the largest legal threshold.
        defaults |= {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if forks:
        preload = ["runtime.worker", "torch._dynamo"]  # torch.optim imports the second
        multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
        forkserver.ensure_running()


def launched_worker(plan: ExecutionPlan, run: RunFile, scratch: Path, launcher: int) -> None:
    """Run one rank; an error, which is in `scratch` by then, ends the process at once and without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback when the keyboard interrupts launcher and ranks
    die_with(launcher)
    from runtime.worker import guarded

    if guarded(plan, run, scratch) is not None:
        os._exit(1)


def die_with(pid: int) -> None:
    """End this process when another one ends, however it does. Not `PR_SET_PDEATHSIG`, because the parent of a forked
    rank is the fork server, which lives as long as its ranks. Without pidfd (Linux 5.3) nothing is watched; raises
    ProcessLookupError when the other one is gone already."""

    def watch(descriptor: int) -> None:
        select.select([descriptor], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    with contextlib.suppress(AttributeError, PermissionError):
        Thread(target=watch, args=(os.pidfd_open(pid),), daemon=True).start()
