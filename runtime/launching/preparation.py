"""Everything that a process does before a run starts: which rank it is, the plan and the run file, and whether both can
run here. Light, so that a mistake is named at once: torch is loaded by the last checks alone."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from plans.legal import legal_plan
from plans.plan import ExecutionPlan
from plans.run_checks import check_run
from plans.runfile import RunFile
from runtime.checkpoints.resume import Start, choose_start
from runtime.launching.cache_rows import check_cache
from runtime.launching.describe import base_words, batch_words, program_words, restart_words
from runtime.launching.entry import prepare_ranks
from runtime.launching.output import check_output
from runtime.launching.preflight import (
    check_devices,
    check_estimate,
    check_job,
    check_packages,
    check_rollback,
    check_samples,
    check_weights,
    read_run,
)
from runtime.launching.slurm import rank_variables
from runtime.models.support import check_supported
from runtime.processes.member import Member, began_again, outside_member
from runtime.processes.place import Place, place_of
from runtime.reports.trackers import check_trackers


@dataclass(frozen=True, slots=True)
class Words:
    """What the command line asks for. dry_run: say what would run, and stop. allow_stale: run although the estimate is
    not of this plan. allow_long: samples may outgrow a model's context. resume: go on from the newest checkpoint. node,
    host, port: which machine of the plan this one is, and where that of node 0 listens."""

    dry_run: bool = False
    allow_stale: bool = False
    allow_long: bool = False
    resume: bool = False
    node: int | None = None
    host: str | None = None
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """A run that can start. member: which rank this process is, None where it starts ranks. place: which of several
    machines this one is, whose ranks it starts."""

    plan: ExecutionPlan
    run: RunFile
    member: Member | None
    start: Start
    place: Place | None = None

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for the run: it is rank 0, starts it, or is on node 0's machine."""
        return (self.member is None or self.member.rank == 0) and (self.place is None or self.place.node == 0)


def read(path: Path, overrides: list[str], run_path: Path | None, words: Words) -> Ready:
    """A run as its files and the environment say it. Raises RealplanError for what is no run."""
    member = outside_member({**os.environ, **rank_variables(os.environ)})
    plan = legal_plan(path)
    if not words.allow_stale:
        check_estimate(plan, path)
    plan = check_samples(plan, path, words.allow_long)
    run = read_run(plan, path, run_path, overrides)
    check_run(plan, run)
    if words.resume or began_again(os.environ):
        run = run.model_copy(update={"resume_from": run.resume_from or str(run.checkpoint_folder)})
    place = place_of(plan, member, words.node, words.host, words.port)
    return Ready(plan, run, member if place is None else None, Start(), place)


def checked(ready: Ready, words: Words) -> Ready:
    """A run that this machine can start, described; with its beginning. Raises RealplanError for what cannot run."""
    plan, run, member, place = ready.plan, ready.run, ready.member, ready.place
    check_rollback(plan, run, alone=member is None)
    _describe(plan, words, ready.first)
    check_supported(plan)
    check_weights(plan, run, alone=place is None and (member is None or member.alone))
    words_at_start = [*base_words(plan, run), *(restart_words(run) if member is not None else ())]
    for line in words_at_start if ready.first else ():
        print(line, file=sys.stderr)
    check_packages()
    for line in check_cache(plan, version("torch")):
        if ready.first:
            print(f"warning: {line}", file=sys.stderr)
    check_trackers(run)
    check_devices(plan, None if member is None else member.world, alone=place is None)
    if ready.first:
        check_output(plan, run)
    # On several machines the checkpoint is chosen when all are there.
    start = choose_start(plan, run) if member is None and place is None else ready.start
    if words.dry_run:
        check_job(plan, run)
    elif member is None:
        prepare_ranks(plan, None if place is None else place.first)
    return replace(ready, start=start)


def _describe(plan: ExecutionPlan, words: Words, first: bool) -> None:
    """The words of the batch; where nothing is to run, what each rank would do."""
    if words.dry_run or first:
        for line in batch_words(plan):
            print(line, file=sys.stdout if words.dry_run else sys.stderr)
    if words.dry_run:
        for line in program_words(plan):
            print(line)
