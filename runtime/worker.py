"""One rank of a run: joins the others, runs its part of the program, and leaves word when it fails."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from plans.errors import RealplanError
from plans.plan import ExecutionPlan
from plans.runfile import RunFile, patience_s
from runtime.checkpoints.course import run_iterations, take_up
from runtime.checkpoints.stopping import StopAgreement
from runtime.evaluation import Evaluations, Evaluator
from runtime.executor import Executor
from runtime.groups import GroupCache, meet
from runtime.job import prepare_job
from runtime.models.installation import install
from runtime.processes.failures import Failure, write_failure
from runtime.processes.lifetime import BATCH_SIGNALS, STOP_SIGNALS
from runtime.processes.member import Member, device_index
from runtime.processes.stores import open_store
from runtime.reports.operations import tell_operations
from runtime.reports.records import Recorder

# A rank that lost a peer gives the launcher this long to find the peer first, and to stop everybody.
GRACE_S = 1.0
FOREVER = timedelta(days=365)
ORIGIN = "realplan/origin"


def guarded(plan: ExecutionPlan, run: RunFile, member: Member, scratch: Path, store: Any = None) -> Failure | None:
    """Run this rank; its error, which is also in `scratch`, or None."""
    try:
        work(plan, run, member, scratch, store)
    except (Exception, SystemExit) as error:
        failure = write_failure(scratch, member.rank, error)
        if failure.secondary:
            time.sleep(GRACE_S)
        return failure
    return None


def work(plan: ExecutionPlan, run: RunFile, member: Member, scratch: Path, store: Any = None) -> None:
    """The life of a rank, until it has said that it is done. store: of the ranks, where it is open already."""
    rank = member.rank
    if member.world != plan.cluster.size:
        raise RealplanError(f"the plan needs {plan.cluster.size} ranks, {member.world} were started")
    device, timeout = _device(plan, member), timedelta(seconds=patience_s(plan, run))
    install(device)
    store = _joined(member, device, timeout, store)
    if rank == 0:
        store.set(ORIGIN, str(time.time()))
    recorder = Recorder(scratch, rank, float(store.get(ORIGIN)))
    tell_operations(recorder, timeout.total_seconds())
    job = prepare_job(plan, run)
    if rank == 0 and job.note:
        print(f"data: {job.note}", file=sys.stderr, flush=True)
    try:
        groups = GroupCache(device, timeout)
        executor = Executor(job, groups, device, recorder)
        take_up(executor, run.resume_from)
        evaluations = None
        if job.held_out is not None:
            evaluator = Evaluator(executor, job, groups, device, recorder)
            evaluations = Evaluations(executor, evaluator, job, rank, executor.state.iterations)
        stop = StopAgreement(scratch, store, timeout)
        if run.checkpoint.every:  # the keyboard speaks to the launcher, which asks its ranks
            stop.listen(*(BATCH_SIGNALS if member.ours else STOP_SIGNALS))
        done = run_iterations(executor, run, recorder, stop, evaluations)
    finally:
        if job.reward is not None:
            job.reward.close()
    if run.export and done == run.iterations:
        role = next(iter(executor.program.homes))
        executor.export(role, Path(run.output) / role)
    recorder.say("export", run.iterations, done=True)
    _part(store, member)


def _joined(member: Member, device: torch.device, timeout: timedelta, store: Any) -> Any:
    """The store of the ranks, which have all met."""
    store = open_store(member, timeout) if store is None else store
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    joined = {"store": store, "rank": member.rank, "world_size": member.world, "timeout": timeout}
    meet(lambda: dist.init_process_group(backend, **joined), range(member.world), timeout)
    if device.type == "cuda":
        dist.barrier(device_ids=[device.index])  # makes the communicator that reallocation sends with
    return store


def _part(store: Any, member: Member) -> None:
    """Say that this rank is done, and leave the others."""
    store.set(f"realplan/done/{member.rank}", "")
    if member.rank == 0:  # it may hold the store, which the others still need
        store.wait([f"realplan/done/{other}" for other in range(member.world)], FOREVER)
    dist.destroy_process_group()


def _device(plan: ExecutionPlan, member: Member) -> torch.device:
    if plan.cluster.gpu.name == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", device_index(member, torch.cuda.device_count()))
