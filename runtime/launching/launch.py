"""Start a run: torch elastic in this process on one machine, or this process as one rank of many."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread

import yaml
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from plans.codec import save_plan
from plans.errors import RealplanError
from plans.files import write_atomically
from plans.plan import ExecutionPlan
from plans.runfile import RunFile
from runtime.launching.entry import die_with, launched_worker, prepare_ranks, start_method
from runtime.launching.failures import RunFailed, find_cause, has_failed, kill_ranks
from runtime.reports.metrics import Metrics
from runtime.reports.monitor import Monitor

POLL_S = 0.5
GRACE_S = 3.0  # longer than a rank that lost a peer waits before it ends itself


def launch(plan: ExecutionPlan, run: RunFile) -> Sequence[Metrics]:
    """Run a plan; the metrics of its iterations. Raises RunFailed with the cause, RealplanError for wrong input.

    Under torchrun or srun (RANK and WORLD_SIZE are set) this process is one rank, and rank 0 keeps the files.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _join(plan, run)
    output = Path(run.output)
    scratch = output / ".ranks"
    _prepare(plan, run, scratch)
    try:
        with Monitor(plan, run.iterations, scratch, output) as monitor:
            _elastic(plan, run, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return monitor.lines


def _prepare(plan: ExecutionPlan, run: RunFile, scratch: Path) -> None:
    """The plan and the run file as they are run, in the output folder, and an empty folder for the ranks."""
    output = Path(run.output)
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        save_plan(plan, output / "plan.json")
        write_atomically(output / "run.yaml", yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False))
    except OSError as error:
        raise RealplanError(f"cannot write to output `{output}`: {error.strerror}", "output=FOLDER") from None


def _elastic(plan: ExecutionPlan, run: RunFile, scratch: Path) -> None:
    prepare_ranks(plan)
    for name in logging.root.manager.loggerDict:  # each has a level of its own; what they know, `find_cause` says
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=plan.cluster.size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        start_method=start_method(plan),
        logs_specs=DefaultLogsSpecs(log_dir=str(scratch / "elastic")),
        shutdown_timeout=5,
    )
    over = Event()
    reaper = Thread(target=_reap, args=(scratch, over), daemon=True)
    reaper.start()
    try:
        elastic_launch(config, launched_worker)(plan, run, scratch, os.getpid())
    except ChildFailedError as error:
        raise find_cause(scratch, {rank: f.exitcode for rank, f in error.failures.items()}) from None
    except SignalException as error:
        raise RunFailed(f"stopped by {error.sigval.name}") from None
    finally:
        over.set()
        reaper.join()


def _reap(scratch: Path, over: Event) -> None:
    """Kill the ranks that outlive an error: elastic would give a stopped process half a minute."""
    while not over.wait(POLL_S):
        if has_failed(scratch) and not over.wait(GRACE_S):
            kill_ranks(scratch)
            return


def _join(plan: ExecutionPlan, run: RunFile) -> Sequence[Metrics]:
    """One rank under torchrun or srun; all machines see one file system."""
    from runtime.worker import guarded

    die_with(os.getppid())
    output = Path(run.output)
    scratch = output / f".ranks-{os.environ.get('TORCHELASTIC_RUN_ID') or os.environ.get('SLURM_JOB_ID', '0')}"
    lines: Sequence[Metrics] = ()
    if os.environ["RANK"] != "0":
        failure = guarded(plan, run, scratch)
    else:
        _prepare(plan, run, scratch)  # before this rank joins the others, who write only after that
        with Monitor(plan, run.iterations, scratch, output) as monitor:
            failure = guarded(plan, run, scratch)
        lines = monitor.lines
    if failure is not None:
        raise RunFailed(failure.message, failure.hint, failure.details)
    if os.environ["RANK"] == "0":
        shutil.rmtree(scratch)
    return lines
