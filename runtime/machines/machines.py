"""The machines of a run as the first one sees them: who is there, what they say, who is lost."""

from __future__ import annotations

import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

from plans.errors import RealplanError
from runtime.machines.files import Source
from runtime.machines.station import Station
from runtime.machines.wire import GONE, MOST_BYTES, Connection, Message, Pace, difference
from runtime.processes.member import Address
from runtime.processes.network import listener, resolve
from runtime.reports.endings import RunFailed, Stopped

POLL_S = 0.1
STOP = "stop"
LEAVE_S, LATE_S = 5.0, 10.0
"""How long the others get to go when a run is over, and those of one that never began to come and be told."""
MOST_STRANGERS = 64
"""Connections at once that have not said yet which machine they are."""


class MachineLost(RunFailed):
    """A machine of the plan that is gone."""


@dataclass
class Machine:
    """A machine that is there: its name, where its checkpoints are served, and its connection (None: this one)."""

    name: str
    source: Source
    connection: Connection | None


class Machines:
    """Owns the connections of the first machine to the others, and speaks to its own station as to theirs. All methods
    belong to the main thread; `handlers` get what machines say unasked, by kind."""

    def __init__(self, address: Address, nodes: int, work: Mapping[str, str], pace: Pace) -> None:
        self.host = resolve(address)[1]
        self._nodes = nodes
        self._work, self._pace = work, pace
        self._heard: queue.SimpleQueue[tuple[int, Connection | None, Message]] = queue.SimpleQueue()
        self._answers: dict[int, Message] = {}
        self._asked = 0
        self._station: Station | None = None
        self._strangers = threading.Semaphore(MOST_STRANGERS)
        self.there: dict[int, Machine] = {}
        self.lost: dict[int, str] = {}
        self._came: set[int] = {0}
        self._declined = ""
        self._over: Message | None = None
        self._refused: set[str] = set()
        self.handlers: dict[str, Callable[[int, Message], None]] = {}
        try:
            self._listener = listener(self.host, address.port)
        except OSError as error:
            raise RealplanError(
                f"cannot listen at {address.host}, port {address.port} ({self.host}): {error.strerror}",
                "--master-addr is an address of the machine of node 0, --master-port a port that is free there",
            ) from None
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        """Where this machine hears the others."""
        return int(self._listener.getsockname()[1])

    def stop(self, words: str) -> None:
        """Have the thread that these belong to raise Stopped when it next takes in what machines have said."""
        self.say({"kind": STOP, "words": words})

    def say(self, message: Message) -> None:
        """How the station of this machine speaks."""
        self._heard.put((0, None, message))

    def settle(self, station: Station) -> None:
        """Take this machine's own station among the machines."""
        self._station = station
        self.there[0] = Machine(socket.gethostname(), station.storage.files.source, None)

    def gather(self, patience_s: float) -> None:
        """Wait until a machine for every node is there. Raises RealplanError for those that do not come, and RunFailed
        for one that says that it cannot take part."""
        nodes, end = self._nodes, monotonic() + patience_s
        while len(self.there) < nodes:
            self.pump(POLL_S)
            if self._declined:
                raise RunFailed(self._declined)
            if monotonic() > end:
                missing = ", ".join(str(node) for node in range(nodes) if node not in self.there)
                raise RealplanError(
                    f"no machine came for node{'s' * (',' in missing)} {missing} within timeout_s = {patience_s:g} s",
                    f"there: realrun plan.json --node-rank N --master-addr {self.host}",
                )

    def send(self, node: int, kind: str, **words: object) -> int:
        """Ask a machine for something; the number of the answer, which a lost machine does not give."""
        self._asked += 1
        message: Message = {"kind": kind, "id": self._asked, **words}
        machine = self.there.get(node)
        if machine is None:
            return self._asked
        if machine.connection is None:
            assert self._station is not None
            self._station.handle(message)
            return self._asked
        try:
            machine.connection.send(message)
        except ConnectionError:
            self._lose(node, machine.connection, GONE)
        except OSError as error:
            self._lose(node, machine.connection, str(error))
        return self._asked

    def answer(self, number: int) -> Message | None:
        """What was answered, once."""
        return self._answers.pop(number, None)

    def ask(self, kind: str, each: Mapping[int, Mapping[str, object]], patience_s: float) -> dict[int, Message]:
        """Ask some machines for something, and wait for those that are not lost meanwhile. Raises RunFailed for one
        that cannot do it, and for one that does not within `patience_s`."""
        asked = {node: self.send(node, kind, **words) for node, words in each.items()}
        found, end = dict[int, Message](), monotonic() + patience_s
        while waits := [node for node in asked if node in self.there and node not in found]:
            self.pump(POLL_S)
            for node in waits:
                answer = self.answer(asked[node])
                if answer is not None:
                    found[node] = answer
            if monotonic() > end and any(node not in found for node in waits):
                late = next(node for node in waits if node not in found)
                raise RunFailed(f"{self.words(late)} has not answered `{kind}` within {patience_s:g} s")
        for node, answer in found.items():
            if "error" in answer:
                raise RunFailed(f"{self.words(node)}: {answer['error']}")
        return found

    def ask_all(self, kind: str, patience_s: float, **words: object) -> dict[int, Message]:
        """Ask every machine that is there."""
        return self.ask(kind, dict.fromkeys(self.there, words), patience_s)

    def words(self, node: int) -> str:
        """A machine in words."""
        name = f" ({self.there[node].name})" if node in self.there else ""
        return f"node {node}{name}"

    def pump(self, timeout_s: float) -> None:
        """Take in what machines have said, this one too; waits for something, for so long."""
        if self._station is not None:
            self._station.poll(0.0)
        wait_s = timeout_s
        while True:
            try:
                node, connection, message = self._heard.get(timeout=wait_s) if wait_s else self._heard.get_nowait()
            except queue.Empty:
                return
            wait_s = 0.0
            self._take(node, connection, message)

    def check(self, nodes: Iterable[int]) -> None:
        """Raise MachineLost where one of some machines is."""
        for node in nodes:
            if node not in self.there:
                raise MachineLost(f"node {node} is lost: {self.lost.get(node, 'it never came')}")

    def _take(self, node: int, connection: Connection | None, message: Message) -> None:
        if message["kind"] == STOP and connection is None:
            raise Stopped(str(message["words"]))
        if message["kind"] == "hello":
            assert connection is not None
            self._welcome(node, connection, message)
        elif node not in self.there or self.there[node].connection is not connection:
            return  # one that is lost, or was replaced
        elif message["kind"] == "lost":
            self._lose(node, connection, str(message["why"]))
        elif message["kind"] == "answer":
            self._answers[int(message["id"])] = message
        elif message["kind"] in self.handlers:
            try:
                self.handlers[message["kind"]](node, message)
            except (KeyError, ValueError, TypeError) as error:
                self._lose(node, connection, f"it says what nobody understands ({error})")

    def _welcome(self, node: int, connection: Connection, hello: Message) -> None:
        refused = "" if node < self._nodes else f"the plan has {self._nodes} nodes"
        if node in self.there:
            refused = f"a machine of node {node} is there already ({self.there[node].name})"
        self._came.add(node)
        answer = {"kind": "refused", "words": refused} if refused else self._over or {"kind": "welcome"}
        with suppress(OSError):
            connection.send(answer)
        if "declines" in hello and not refused:
            self._declined = f"node {node} ({hello['name']}) cannot take part: {hello['declines']}"
            print(self._declined, file=sys.stderr)
        if answer["kind"] != "welcome" or "declines" in hello:
            connection.close()
            return
        host, port, secret = hello["source"]
        self.lost.pop(node, None)
        self._declined = ""
        self.there[node] = Machine(str(hello["name"]), (str(host), int(port), str(secret)), connection)
        connection.beat()

    def _lose(self, node: int, connection: Connection | None, why: str) -> None:
        machine = self.there.pop(node)
        if connection is not None:
            connection.close()
        self.lost[node] = f"{machine.name}: {why}"
        words = f"node {node} is lost ({self.lost[node]})"
        print(words, file=sys.stderr)
        for other in self.there.values():
            if other.connection is not None:
                with suppress(OSError):  # it is lost too, and will be noticed
                    other.connection.send({"kind": "note", "words": words})

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                end, _ = self._listener.accept()
                threading.Thread(target=self._hear, args=(end,), daemon=True).start()

    def _hear(self, end: socket.socket) -> None:
        """The life of a connection: who it is, and what it says until it ends."""
        connection, node = Connection(end, self._pace), -1
        try:
            with self._strangers:
                said = connection.messages()
                hello = next(said, {})
                node = int(hello["node"])
                other = difference(self._work, hello["work"])
                _ = [str(hello["name"]), *(() if "declines" in hello else hello["source"])]
            if other:
                words = f"{other} is not that of node 0"
                self._say_once(f"a machine at {connection.host}, which would be node {node}, is refused: {words}")
                connection.send({"kind": "refused", "words": words})
                connection.close()
                return
            connection.most_bytes = MOST_BYTES
            self._heard.put((node, connection, hello))
            for message in said:
                self._heard.put((node, connection, message))
            why = GONE
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = str(error)
        if node >= 0:
            self._heard.put((node, connection, {"kind": "lost", "why": why}))
        else:
            connection.close()

    def _say_once(self, words: str) -> None:
        """Say of a machine that is not let in why: it may be one that the run waits for. Not without end."""
        if words not in self._refused and len(self._refused) < MOST_STRANGERS:
            self._refused.add(words)
            print(words, file=sys.stderr)

    def close(self, words: str, *, done: bool, late_s: float = 0.0) -> None:
        """Tell the other machines how the run ended, and wait a while until they have gone. late_s: how long those that
        have never come may still come, to be told too."""
        self._over = {"kind": "over", "words": words, "done": done}
        others = {node: m.connection for node, m in self.there.items() if m.connection is not None}
        for end_of in others.values():
            with suppress(OSError):
                end_of.send(self._over)
        begun = monotonic()
        while (others and monotonic() < begun + LEAVE_S) or (
            len(self._came) < self._nodes and monotonic() < begun + late_s
        ):
            with suppress(queue.Empty):
                node, connection, message = self._heard.get(timeout=POLL_S)
                if message["kind"] == "hello" and connection is not None:
                    self._welcome(node, connection, message)
                elif message["kind"] == "lost" and others.get(node) is connection:
                    del others[node]
        self._listener.close()
        for machine in self.there.values():
            if machine.connection is not None:
                machine.connection.close()
