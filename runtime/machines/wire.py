"""What the machines of a run say to each other: lines of JSON over TCP. Nothing is unpickled or run."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from plans.codec import dump_plan
from plans.plan import ExecutionPlan
from plans.runfile import RunFile
from runtime.machines.named import input_paths, renamed, weight_folders

Message = dict[str, Any]
BEAT, GONE = "beat", "it went away"
MOST_BYTES, MOST_STRANGER_BYTES = 2**30, 2**20
_CHUNK = 2**16
_OWN = ("output", "checkpoint", "resume_from", "workload")


class Silent(OSError):
    """The other side has said nothing for too long."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a machine says that it is there, and after how long without a word it counts as lost, in seconds."""

    beat_s: float
    quiet_s: float


def pace_of(timeout_s: float) -> Pace:
    """A machine is missed in half of the time that ranks wait for each other, so that the cause is known first."""
    quiet_s = min(max(timeout_s / 2, 2.0), 60.0)
    return Pace(quiet_s / 10, quiet_s)


class Connection:
    """One end of a connection. Any thread may send, one receives. Sends and receives that take longer than `quiet_s`
    fail, and so does everything after `close`."""

    def __init__(self, end: socket.socket, pace: Pace) -> None:
        self._socket, self._pace = end, pace
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.most_bytes = MOST_STRANGER_BYTES
        """Of one message: more are taken from who has said who it is."""
        end.settimeout(pace.quiet_s)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def host(self) -> str:
        """Address of the other end."""
        return str(self._socket.getpeername()[0])

    def send(self, message: Message) -> None:
        """Send a message. Raises OSError."""
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            self._socket.sendall(data)

    def messages(self) -> Iterator[Message]:
        """What the other side says, without its beats, until it goes away. Raises Silent, OSError, and ValueError
        for what is no message."""
        left = bytearray()
        while True:
            try:
                chunk = self._socket.recv(_CHUNK)
            except TimeoutError:
                raise Silent(f"nothing was heard for {self._pace.quiet_s:g} s") from None
            except ConnectionError:  # a process that was killed leaves what it had not read
                return
            if not chunk:
                return
            left += chunk
            if len(left) > self.most_bytes:
                raise ValueError(f"a message of more than {self.most_bytes:,} bytes")
            *lines, rest = left.split(b"\n") if b"\n" in chunk else [left]
            left = bytearray(rest)
            for line in lines:
                try:
                    message = json.loads(line)
                except RecursionError:
                    raise ValueError("a message of many levels") from None
                if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
                    raise ValueError("no message of a run")
                if message["kind"] != BEAT:
                    yield message

    def beat(self) -> None:
        """Say that this side is there from now on, in a thread, until the connection is closed or breaks."""
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        with suppress(OSError):
            while not self._closed.wait(self._pace.beat_s):
                self.send({"kind": BEAT})

    def close(self) -> None:
        """End the connection; who reads from it is told."""
        self._closed.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def work_of(plan: ExecutionPlan, run: RunFile) -> dict[str, str]:
    """Digests of what all machines of a run must have alike, key by key; also what a stranger does not know. Folders
    that are written to may be each machine's own, and so where weights, data and tokenizer lie: what they hold is
    compared when they are spread."""
    values = {"the plan": dump_plan(plan)}
    weights, inputs = (_numbers(paths) for paths in (weight_folders(run), input_paths(run)))
    run = renamed(run, weights, inputs)
    values |= {key: json.dumps(value) for key, value in run.model_dump(mode="json").items() if key not in _OWN}
    return {key: hashlib.sha256(value.encode()).hexdigest() for key, value in values.items()}


def _numbers(paths: Sequence[str]) -> dict[str, str]:
    return {path: f"#{number}" for number, path in enumerate(paths)}


def difference(ours: Mapping[str, str], theirs: object) -> str:
    """The first key of the work that another machine has otherwise; empty where there is none."""
    if not isinstance(theirs, dict):
        return "the work"
    return next((key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)), "")
