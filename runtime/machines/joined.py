"""Ranks that another launcher (torchrun, srun) has started, on machines that need share no folder.

The lowest rank of each machine keeps the files of its machine in a thread, as a realrun that starts its ranks itself
does; that of rank 0 leads the run. The others wait until it has them begin.
"""

from __future__ import annotations

import json
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from plans.errors import RealplanError
from plans.plan import ExecutionPlan
from plans.runfile import RunFile, patience_s
from runtime.launching.entry import prepare_joining
from runtime.machines.agent import serve
from runtime.machines.crew import Crew
from runtime.machines.machines import Machines
from runtime.machines.party import JoinedRanks, Party, gather, heard, publish, published, say_here
from runtime.machines.run import conduct, leading
from runtime.machines.station import Station
from runtime.machines.wire import pace_of, work_of
from runtime.processes.lifetime import die_with, end_at_once
from runtime.processes.member import Address, Member
from runtime.processes.network import own_address, resolve
from runtime.processes.place import Place
from runtime.reports.endings import RunFailed
from runtime.reports.metrics import Metrics

POLL_S = 0.1
END_S = 5.0
"""How long a rank gets to end by itself when its run has failed, or whoever keeps the files of its machine is gone."""

_TOLD = ("resume_from", "skip_batches", "export", "weights", "tokenizer", "data", "evaluation")
"""Keys of the run file that the ranks of a machine are told. No others: the store is open to whoever reaches it, and a
reward names what a rank runs."""

Words = dict[str, Any]
Begin = Callable[[Words], None]


def join(plan: ExecutionPlan, run: RunFile, member: Member) -> Sequence[Metrics]:
    """Be a rank of a run that another launcher has started; the metrics of its iterations on rank 0, none on others.
    Raises RunFailed with the cause, RealplanError for wrong input."""
    address, rank = member.meeting, member.rank
    assert isinstance(address, Address)
    die_with(os.getppid())
    prepare_joining(plan, address)
    from runtime.processes.stores import open_store

    store = open_store(member, timedelta(seconds=patience_s(plan, run)))
    say_here(store, rank, [Path(run.output), run.checkpoint_folder])
    if rank == 0:
        machines, party = _first(plan, run, address, *gather(store, member.world))
        publish(store, party)
        keep = partial(_lead, plan, run, machines, party, address.job)
        return _Keeper(store, 0, keep, machines.stop).work(plan, run, member)
    party = published(store)
    node = party.machine_of(rank)
    leader = party.ranks[node][0]
    if rank == leader:
        return _Keeper(store, rank, partial(_follow, plan, run, party, node)).work(plan, run, member)
    die_with(party.pids[leader], partial(_end_without, leader))
    _do(plan, run, member, store, _told(store, leader))
    return ()


def _first(
    plan: ExecutionPlan, run: RunFile, address: Address, ranks: list[list[int]], pids: list[int]
) -> tuple[Machines, Party]:
    """The first machine of a run, at an address of its own that leads to where the ranks meet."""
    own = own_address(resolve(address)[1])
    machines = Machines(Address(own, 0), len(ranks), work_of(plan, run), pace_of(patience_s(plan, run)))
    return machines, Party(ranks, pids, machines.host, machines.port)


def _lead(
    plan: ExecutionPlan, run: RunFile, machines: Machines, party: Party, job: str, begin: Begin
) -> Sequence[Metrics]:
    """Keep the files of the run, on the first machine."""
    scratch = Path(run.output) / f".ranks-{re.sub('[^A-Za-z0-9]', '-', job)[:40]}"
    starter = partial(_begin, begin, party)
    with leading(machines), Station(run, machines.host, machines.say, scratch, starter=starter) as station:
        machines.settle(station)
        machines.gather(patience_s(plan, run))
        crew = Crew(machines, run, scratch, dict(enumerate(party.ranks)))
        return conduct(plan, run, machines, station, crew, partial(crew.attempt, plan))


def _follow(plan: ExecutionPlan, run: RunFile, party: Party, node: int, begin: Begin) -> Sequence[Metrics]:
    """Keep the files of the ranks of another machine."""
    serve(plan, run, Place(node, Address(party.host, party.port)), partial(_begin, begin, party))
    return ()


def _begin(
    begin: Begin, party: Party, _: ExecutionPlan, run: RunFile, numbers: Sequence[int], scratch: Path, *__: object
) -> JoinedRanks:
    """Have the ranks of this machine begin."""
    begin({"run": run.model_dump(mode="json", include=set(_TOLD)), "scratch": str(scratch)})
    return JoinedRanks(numbers, party.pids, scratch)


def _key(leader: int) -> str:
    """Of the store: what the ranks of a machine are told."""
    return f"realplan/begin/{leader}"


def _told(store: Any, leader: int) -> Words:
    """What the ranks of a machine are told, when they are: the weights may be on their way to it for a long time."""
    try:
        while not store.check([_key(leader)]):
            time.sleep(POLL_S)
    except RuntimeError:
        raise RunFailed("rank 0, which holds the store of the ranks, is gone") from None
    found: Words = heard(store, _key(leader), f"rank {leader}")
    return found


def _do(plan: ExecutionPlan, run: RunFile, member: Member, store: Any, words: Words) -> None:
    """Run a rank as it was told. Raises RunFailed."""
    if "failed" in words:
        raise RunFailed(*words["failed"])
    from runtime.worker import guarded

    told = run.model_dump(mode="json") | {key: words["run"][key] for key in _TOLD}
    run = RunFile.model_validate_json(json.dumps(told))
    failure = guarded(plan, run, member, Path(words["scratch"]), store)
    if failure is not None:
        raise RunFailed(failure.message, failure.hint, failure.details)


class _Keeper:
    """Keeps the files of a machine in a thread beside this process's own rank. keep: does it, and is given what has the
    ranks begin. stop: ends it early."""

    def __init__(
        self,
        store: Any,
        rank: int,
        keep: Callable[[Begin], Sequence[Metrics]],
        stop: Callable[[str], None] | None = None,
    ) -> None:
        self._store, self._rank, self._stop = store, rank, stop
        self._words: queue.SimpleQueue[Words] = queue.SimpleQueue()
        self._begun = False
        self._result: Future[Sequence[Metrics]] = Future()
        threading.Thread(target=self._keep, args=(keep,), name="keeper", daemon=True).start()

    def work(self, plan: ExecutionPlan, run: RunFile, member: Member) -> Sequence[Metrics]:
        """Run this process's rank; what `keep` returns when the run is over. Raises what it does: on rank 0 the cause
        of a failure, wherever it lies."""
        from runtime.worker import guarded  # noqa: F401  (loads torch while the machines gather)

        try:
            _do(plan, run, member, self._store, self._words.get())
        except RunFailed:
            wait([self._result], END_S if self._rank else None)
            if not self._rank:
                self._result.result()
            raise
        except BaseException as error:
            if self._stop is not None:
                self._stop(f"stopped by {type(error).__name__}")
                wait([self._result], END_S)
            raise
        return self._result.result()

    def _begin(self, words: Words) -> None:
        """The store is this thread's until the rank of this process begins."""
        if not self._begun:
            self._begun = True
            self._store.set(_key(self._rank), json.dumps(words))
            self._words.put(words)

    def _keep(self, keep: Callable[[Begin], Sequence[Metrics]]) -> None:
        try:
            self._result.set_result(keep(self._begin))
            return
        except RealplanError as error:
            failed = error
        except BaseException as error:
            failed = RunFailed(f"{type(error).__name__}: {error}")
        self._begin({"failed": [failed.message, failed.hint]})
        self._result.set_exception(failed)
        time.sleep(END_S)  # the rank may wait for one that is cut off, for as long as timeout_s
        print(f"error: {failed}", file=sys.stderr)
        end_at_once(1)


def _end_without(leader: int) -> None:
    time.sleep(END_S)
    print(f"error: rank {leader}, which keeps the files of this machine, is gone", file=sys.stderr)
    end_at_once(1)
