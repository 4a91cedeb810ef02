"""Commands `python -c CODE ...` in processes that have torch and megatron imported already.

A fresh interpreter spends fourteen CPU seconds on imports until a run's ranks stand: in its launcher, and in its fork
server. Here one process imports once and forks each command, whose fork server is a fork too. The processes are
otherwise those of a command that is started afresh: the same parents, signals, files and ends. All workers of a test
run share that process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from itertools import pairwise
from multiprocessing import util
from pathlib import Path
from typing import NoReturn

from runtime.processes.lifetime import BATCH_SIGNALS, STOP_SIGNALS

ROOT = Path(__file__).parents[1]
IMPORTS = ("runtime.worker", "torch._dynamo", "runtime.launching.launch", "runtime.cli")
Outcome = subprocess.CompletedProcess[str]


def stand_for(code: str) -> NoReturn:
    """Be `python -c CODE ...` with the words, files, folder and environment of this process, which a launcher has
    started: a warm command does it, and this process ends as that one does."""
    status, theirs = os.pipe()
    request = {"code": code, "words": sys.argv[1:], "environment": dict(os.environ), "cwd": os.getcwd()}
    _ask(request, [1, 2, theirs])
    os.close(theirs)
    with open(status) as lines:
        pid = int(lines.readline())
        for number in BATCH_SIGNALS:
            signal.signal(number, lambda got, _: os.kill(pid, got))
        number = int(lines.readline())
    if number < 0:
        os.kill(os.getpid(), -number)
    sys.exit(number)


class Started:
    """A command under way, with what `subprocess.Popen` offers of it. It leads a session of its own."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], cwd: Path) -> None:
        self._words = [tempfile.TemporaryFile(mode="w+") for _ in range(2)]  # noqa: SIM115
        self._status, status = os.pipe()
        request = {"code": command[2], "words": command[3:], "environment": dict(environment), "cwd": str(cwd)}
        try:
            _ask(request, [*(file.fileno() for file in self._words), status])
        finally:
            os.close(status)
        self.pid = int(self._line())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code once it has ended."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._line())
            os.close(self._status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when it has ended."""
        if self.returncode is None and not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a warm command", timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has said on stdout and stderr, when it has ended."""
        self.wait(timeout)
        for file in self._words:
            file.seek(0)
        out, said = (file.read() for file in self._words)
        return out, said

    @property
    def words(self) -> str:
        """What it has said on stderr so far."""
        file = self._words[1].fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode()

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def _line(self) -> bytes:
        found = b""
        while not found.endswith(b"\n"):
            part = os.read(self._status, 1)
            assert part, "the process that starts warm commands has died"
            found += part
        return found


def start_warm(command: Sequence[str], environment: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Started:
    """Start `[sys.executable, "-c", CODE, ...]`."""
    assert list(command[:2]) == [sys.executable, "-c"], command
    return Started(command, os.environ if environment is None else environment, cwd)


def run_warm(command: Sequence[str], timeout: float, environment: Mapping[str, str] | None = None) -> Outcome:
    """Run such a command to its end, as `subprocess.run` would; killed when it takes longer."""
    process = start_warm(command, environment)
    try:
        out, said = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.wait(), out, said)


class _Server:
    """The process that imports and forks; it ends with this one."""

    def __init__(self) -> None:
        # What glibc and torch read when a process starts is that of a rank.
        from runtime.launching.entry import rank_defaults

        place = str(Path(tempfile.mkdtemp(prefix="warm-")) / "socket")
        environment = rank_defaults(cpu=True) | os.environ | {"OMP_NUM_THREADS": "1"}
        paths = [str(ROOT), str(Path(__file__).parent)]
        alive, self._alive = os.pipe()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as requests:
            requests.bind(place)
            requests.listen(64)
            code = f"import sys; sys.path[:0] = {paths!r}; import warm; warm.serve({requests.fileno()}, {alive})"
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=[requests.fileno(), alive],
            )
        os.close(alive)
        os.environ[PLACE] = place


PLACE = "REALPLAN_TESTS_WARM"
"""Environment variable: the socket of the process that forks. Whatever a process starts shares its own."""
_servers: list[_Server] = []


def share_warm() -> None:
    """Start the process that imports and forks, for this process and those that it starts."""
    if PLACE not in os.environ:
        _servers.append(_Server())


def _ask(request: object, files: Sequence[int]) -> None:
    """Have a command started that has these as stdout, stderr, and where its pid and exit code are written."""
    share_warm()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(os.environ[PLACE])
        socket.send_fds(server, [json.dumps(request).encode()], list(files))


def serve(listening: int, alive: int) -> NoReturn:
    """Fork commands until whoever has started this has ended and closed `alive`."""
    for name in IMPORTS:
        __import__(name)
    requests = socket.socket(fileno=listening)
    folder = Path(requests.getsockname()).parent
    while True:
        ready, _, _ = select.select([requests, alive], [], [])
        if alive in ready:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)
        with requests.accept()[0] as one:
            data, files, _, _ = socket.recv_fds(one, 2**20, 3)
        if not os.fork():
            requests.close()
            os.close(alive)
            _watch(json.loads(data), *files)
        for file in files:
            os.close(file)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _watch(request: Mapping[str, object], out: int, said: int, status: int) -> NoReturn:
    """Fork a command and write its pid and exit code."""
    pid = os.fork()
    if not pid:
        os.close(status)
        _become(request, out, said)
    os.close(out)
    os.close(said)
    os.write(status, f"{pid}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        os.write(status, f"{code}\n".encode())
    os._exit(0)


def _become(request: Mapping[str, object], out: int, said: int) -> NoReturn:
    """Be the command."""
    os.setsid()
    for file, number in ((out, 1), (said, 2)):
        os.dup2(file, number)
        os.close(file)
    # What these were opened on tells a stream whether it can seek.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    os.chdir(str(request["cwd"]))
    sys.argv = ["-c", *request["words"]]  # type: ignore[misc]
    tempfile.tempdir = None
    util.spawnv_passfds = _fork_instead
    _end(str(request["code"]))


def _fork_instead(_: object, words: Sequence[bytes | str], files: Sequence[int]) -> int:
    """Stands for the start of multiprocessing's fork server and resource tracker: a fork, with what is imported."""
    pid = os.fork()
    if not pid:
        _keep_only({0, 1, 2, *files})
        _end(os.fsdecode(words[-1]))
    return pid


def _keep_only(files: set[int]) -> None:
    """What a process that is started afresh inherits: some files, and no handlers of signals or of its end."""
    keep = [*sorted(files), os.sysconf("SC_OPEN_MAX")]
    for low, high in pairwise(keep):
        os.closerange(low + 1, high)
    for number in (*STOP_SIGNALS, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    util._finalizer_registry.clear()


def _end(code: str) -> NoReturn:
    """Run code as a program, and end with its exit code."""
    number = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        number = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        number = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(number)
