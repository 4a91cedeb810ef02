"""Processes of ranks: how they start and how they end. Light: the launcher needs neither torch nor megatron for it."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

from plans.errors import RealplanError
from plans.plan import ExecutionPlan
from plans.runfile import RunFile
from runtime.processes.lifetime import STOP_SIGNALS, deaf_children, die_with, hear
from runtime.processes.member import Address, Member
from runtime.processes.network import interface_of, resolve
from runtime.reports.records import crash_path

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def start_method(plan: ExecutionPlan) -> str:
    """On the CPU a server imports torch and megatron once and forks the ranks; CUDA does not survive a fork."""
    return "forkserver" if plan.cluster.gpu.name == "cpu" else "spawn"


def prepare_ranks(plan: ExecutionPlan, meeting: Address | None = None) -> None:
    """Set what torch and the ranks read from the environment, where the user has not, and start the fork server, which
    imports while the launcher does. A second call does nothing.

    meeting: where the ranks of several machines meet. Without it all run on this machine, so that their libraries
    listen on its loopback alone, whatever the user has set for runs on several."""
    forks = start_method(plan) == "forkserver"
    defaults = rank_defaults(forks)
    if meeting is None:
        os.environ.update(LOOPBACK)
    elif interface := interface_of(resolve(meeting)[1]):
        defaults["GLOO_SOCKET_IFNAME"] = interface
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # Ranks end with their fork server, and those that were asked to stop have a checkpoint to write. The tracker comes
    # first, since its start lets SIGTERM through again.
    with deaf_children():
        resource_tracker.ensure_running()
    if forks:
        preload = ["runtime.launching.fork_server", "runtime.worker", "torch._dynamo"]  # torch.optim imports the last
        multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
        try:
            with deaf_children():
                forkserver.ensure_running()
        except OSError as error:  # its socket lies in the folder for temporary files, and an address has 107 characters
            raise RealplanError(
                f"the fork server cannot listen in `{tempfile.gettempdir()}`: {error}", "set TMPDIR to a shorter folder"
            ) from None


def multiprocessing_folder() -> list[Path]:
    """Where the fork server of this process has its socket, where there is one."""
    folder = multiprocessing.current_process()._config.get("tempdir")  # type: ignore[attr-defined]
    return [Path(folder)] if folder else []


def prepare_joining(plan: ExecutionPlan, address: Address) -> None:
    """The same for a process that another launcher has started as a rank: gloo listens on the interface that leads to
    rank 0, where the user names none."""
    defaults = rank_defaults(plan.cluster.gpu.name == "cpu")
    if interface := interface_of(resolve(address)[1]):
        defaults["GLOO_SOCKET_IFNAME"] = interface
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def rank_defaults(cpu: bool) -> dict[str, str]:
    """Variables that torch, its libraries and glibc read in a rank."""
    defaults = {"TORCH_CPP_LOG_LEVEL": "ERROR", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if not cpu:
        # Weights, buffers and caches come and go: with segments of fixed sizes the allocator held 3 to 6 % more than
        # was in use at once on an H200, with these at most 1.5 %.
        defaults["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if cpu:
        # Threads that wait for each other's cores burn several times the time that they save.
        defaults["OMP_NUM_THREADS"] = "1"
        # glibc keeps freed activations instead of giving their pages back to the system and faulting them in again:
        # 17 % of a training step of SmolLM2-135M with 8 micro-batches. 32 MiB is the largest legal threshold.
        defaults |= {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    return defaults


def launched_worker(
    plan: ExecutionPlan, run: RunFile, member: Member, scratch: Path, launcher: int, traces: Sequence[Path]
) -> None:
    """Run one rank; an error, which is in `scratch` by then, ends the process at once and without a traceback. traces:
    folders that a launcher which is killed cannot take away itself."""
    # Keyboards and batch systems interrupt launcher and ranks alike. With checkpoints the launcher asks the ranks to
    # stop; without, they end at once and show no traceback.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN if run.checkpoint.every else signal.SIG_DFL)
    hear()
    die_with(launcher, lambda: _die_with(traces))
    faulthandler.enable(crash_path(scratch, member.rank).open("w", encoding="utf-8"))
    from runtime.worker import guarded

    if guarded(plan, run, member, scratch) is not None:
        os._exit(1)


def _die_with(traces: Sequence[Path]) -> None:
    for folder in traces:
        shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGKILL)
