"""A run over several machines: a realrun on each. The first one, that of node 0, has the loop over attempts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from plans.errors import RealplanError
from plans.plan import ExecutionPlan
from plans.runfile import RunFile, patience_s
from runtime.checkpoints.folder import stop_request
from runtime.checkpoints.resume import Start
from runtime.launching.keeping import check_done, own_output, stopped_by_signals
from runtime.launching.output import exported_role
from runtime.launching.restarts import with_restarts
from runtime.machines.agent import decline, serve
from runtime.machines.crew import FETCH_S, Crew, exports_itself
from runtime.machines.loading import spread_weights
from runtime.machines.machines import LATE_S, Machines
from runtime.machines.station import Station
from runtime.machines.wire import Message, pace_of, work_of
from runtime.processes.place import Place
from runtime.reports.endings import Stopped
from runtime.reports.metrics import Metrics


def run_on_machines(plan: ExecutionPlan, run: RunFile, place: Place) -> Sequence[Metrics]:
    """Run a plan as one of its machines; the metrics of its iterations on the first one, none on others. Raises
    RunFailed with the cause, RealplanError for wrong input."""
    if place.node:
        serve(plan, run, place)
        return ()
    with leading(_machines(plan, run, place)) as machines:
        return _coordinate(plan, run, machines)


@contextmanager
def leading(machines: Machines) -> Iterator[Machines]:
    """Be the first machine; the others are told how that ends."""
    words, done, late_s = "", False, 0.0
    try:
        yield machines
        done = True
    except BaseException as error:
        words = str(error) if isinstance(error, RealplanError) else type(error).__name__
        late_s = LATE_S if isinstance(error, RealplanError) and not isinstance(error, Stopped) else 0.0
        raise
    finally:
        machines.close(words, done=done, late_s=late_s)


@contextmanager
def told(plan: ExecutionPlan, run: RunFile, place: Place | None) -> Iterator[None]:
    """Where a machine finds that it cannot take part, the others of the run end with its words, instead of waiting for
    it."""
    try:
        yield
    except RealplanError as error:
        if place is not None:
            print(f"node {place.node} cannot take part, and tells the other machines: {error.message}", file=sys.stderr)
            with suppress(RealplanError):  # nobody is there; its own error is the one to show
                if place.node:
                    decline(plan, run, place, str(error))
                else:
                    _machines(plan, run, place).close(str(error), done=False, late_s=LATE_S)
        raise


def _machines(plan: ExecutionPlan, run: RunFile, place: Place) -> Machines:
    return Machines(place.first, plan.cluster.nodes, work_of(plan, run), pace_of(patience_s(plan, run)))


def _coordinate(plan: ExecutionPlan, run: RunFile, machines: Machines) -> Sequence[Metrics]:
    scratch = Path(run.output) / ".ranks"
    with stopped_by_signals(run, scratch) as asked, Station(run, machines.host, machines.say, scratch) as station:

        def stop(node: int, message: Message) -> None:
            asked.append(f"{message['by']} to {machines.words(node)}")
            stop_request(scratch).touch()

        machines.handlers["asked"] = stop
        machines.settle(station)
        machines.gather(patience_s(plan, run))
        crew = Crew(machines, run, scratch)

        def attempts(start: Start) -> Sequence[Metrics]:
            return with_restarts(
                plan, run, start, crew.attempt, asked, crew.devices_left,
                choose=crew.choose, forget=crew.forget, search=crew.replanned,
            )  # fmt: skip

        return conduct(plan, run, machines, station, crew, attempts, asked)


def conduct(
    plan: ExecutionPlan,
    run: RunFile,
    machines: Machines,
    station: Station,
    crew: Crew,
    attempts: Callable[[Start], Sequence[Metrics]],
    asked: Sequence[str] = (),
) -> Sequence[Metrics]:
    """The course of a run whose machines are all there: where it begins, its attempts, and what it leaves. asked: who
    has asked it to stop."""
    start = crew.choose(plan, run)
    with own_output(plan, run, start):
        crew.begin(start)
        lines = attempts(start)
        check_done(run, lines, asked)
        if run.export and not exports_itself(run):
            _export(plan, run, crew, machines, station)
    return lines


def _export(plan: ExecutionPlan, run: RunFile, crew: Crew, machines: Machines, station: Station) -> None:
    """Write the weights of the last checkpoint, whose slices come from wherever they are."""
    from runtime.checkpoints.export import export_checkpoint

    role = exported_role(plan)
    found = crew.exported(role)
    if plan.workload.models[role].lora:  # the base that adapters are merged into is in no checkpoint
        spread_weights(machines, run, plan, {0: None}, FETCH_S)
    export_checkpoint(found, Path(run.output) / role, role, weights=station.placed().weights_of(role))
