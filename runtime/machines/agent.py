"""A machine that is not the first one: it does what the first one asks, until the run is over or either is cut off."""

from __future__ import annotations

import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic, sleep

from plans.errors import RealplanError
from plans.plan import ExecutionPlan
from plans.runfile import RunFile, patience_s
from runtime.launching.ranks import Starter, start_ranks
from runtime.machines.station import Station
from runtime.machines.wire import GONE, MOST_BYTES, Connection, Message, pace_of, work_of
from runtime.processes.lifetime import STOP_SIGNALS
from runtime.processes.network import own_address, resolve
from runtime.processes.place import Place
from runtime.reports.endings import RunFailed, Stopped

POLL_S = 0.2
RETRY_S = 0.2


def serve(plan: ExecutionPlan, run: RunFile, place: Place, starter: Starter = start_ranks) -> None:
    """Be a machine of a run until it has ended well. Raises RunFailed where it has not, where the first machine went
    away or is not heard any more, and where a second signal asks; no rank that `starter` can end is left then."""
    host = resolve(place.first)[1]
    connection = _connect(plan, run, place, host)
    heard: queue.SimpleQueue[Message] = queue.SimpleQueue()
    try:
        with _asking(connection, run), _station(plan, run, place, host, connection, starter) as station:
            connection.send(_hello(plan, run, place) | {"source": station.storage.files.source})
            connection.beat()
            threading.Thread(target=_listen, args=(connection, heard), daemon=True).start()
            _work(station, heard, place)
    except ConnectionError:
        raise _cut_off(place, GONE) from None
    except OSError as error:
        raise _cut_off(place, str(error)) from None
    finally:
        connection.close()


def decline(plan: ExecutionPlan, run: RunFile, place: Place, words: str) -> None:
    """Tell the first machine, which may start later, why this one cannot take part. Raises RealplanError where nobody
    is there."""
    connection = _connect(plan, run, place, resolve(place.first)[1])
    try:
        _say_no(plan, run, place, connection, words)
    finally:
        connection.close()


def _say_no(plan: ExecutionPlan, run: RunFile, place: Place, connection: Connection, words: str) -> None:
    """Send the words, and wait until they have come."""
    with suppress(OSError, ValueError):
        connection.send(_hello(plan, run, place) | {"declines": words})
        next(connection.messages(), None)


def _hello(plan: ExecutionPlan, run: RunFile, place: Place) -> Message:
    return {"kind": "hello", "node": place.node, "name": socket.gethostname(), "work": work_of(plan, run)}


def _station(
    plan: ExecutionPlan, run: RunFile, place: Place, host: str, connection: Connection, starter: Starter
) -> Station:
    own = own_address(host)
    try:
        return Station(run, own, connection.send, node=place.node, starter=starter)
    except OSError as error:
        words = f"cannot serve its files at {own or 'an address that leads to node 0'}: {error.strerror or error}"
        _say_no(plan, run, place, connection, words)
        raise RealplanError(f"node {place.node} {words}") from None


def _work(station: Station, heard: queue.SimpleQueue[Message], place: Place) -> None:
    """Do what is asked until the run is over."""
    while True:
        station.poll(POLL_S / 2)
        try:
            message = heard.get(timeout=POLL_S / 2)
        except queue.Empty:
            continue
        kind = message["kind"]
        if kind == "welcome":
            print(f"node {place.node}: waits for node 0 to start its ranks", file=sys.stderr)
        elif kind == "note":
            print(message["words"], file=sys.stderr)
        elif kind == "refused":
            hint = "the same plan and run file on every machine, and every --node-rank once"
            raise RealplanError(f"node 0 ({place.first.host}) refuses node {place.node}: {message['words']}", hint)
        elif kind == "over":
            if not message["done"]:
                raise RunFailed(f"node 0 has ended the run: {message['words']}")
            return
        elif kind == "lost":
            raise _cut_off(place, str(message["why"]))
        else:
            station.handle(message)


def _listen(connection: Connection, heard: queue.SimpleQueue[Message]) -> None:
    why = GONE
    try:
        for message in connection.messages():
            heard.put(message)
    except (OSError, ValueError) as error:
        why = str(error)
    heard.put({"kind": "lost", "why": why})


def _connect(plan: ExecutionPlan, run: RunFile, place: Place, host: str) -> Connection:
    """Reach the first machine, which may start later. Raises RealplanError."""
    patience = patience_s(plan, run)
    pace, end = pace_of(patience), monotonic() + patience
    while True:
        try:
            connection = Connection(socket.create_connection((host, place.first.port), timeout=pace.quiet_s), pace)
            connection.most_bytes = MOST_BYTES
            return connection
        except OSError as error:
            if monotonic() > end:
                raise RealplanError(
                    f"nobody answered at {place.first.host}, port {place.first.port} ({host}) within timeout_s = "
                    f"{patience:g} s: {error.strerror or error}",
                    "is realrun running there with --node-rank 0, and is the port open between the machines?",
                ) from None
        sleep(RETRY_S)


def _cut_off(place: Place, why: str) -> RunFailed:
    return RunFailed(
        f"node {place.node} stops: node 0 ({place.first.host}) is lost ({why})",
        "what goes on is the side with node 0; without it, --resume on the machines that are left",
    )


@contextmanager
def _asking(connection: Connection, run: RunFile) -> Iterator[None]:
    """The first of STOP_SIGNALS asks the first machine to stop the run with a checkpoint; others become Stopped."""
    asked: list[str] = []

    def stop(number: int, _: object) -> None:
        name = signal.Signals(number).name
        if asked or number == signal.SIGHUP or not run.checkpoint.every:
            raise Stopped(f"stopped by {name}")
        asked.append(name)
        threading.Thread(target=connection.send, args=({"kind": "asked", "by": name},), daemon=True).start()
        print(f"{name}: node 0 is asked to stop the run with a checkpoint; once more: at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, stop) for number in (*STOP_SIGNALS, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
