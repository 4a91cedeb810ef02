"""Rewards that are Python functions, in processes of their own with a limit on time and memory.

A function that raises, hangs, exits, dies or returns what is no score ends the run with its name and the sample that
did it, and never the rank that waits for it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from runtime.batches.reward_errors import RewardError
from runtime.processes.lifetime import deaf_children

START_S = 300.0  # to load the function; big libraries on a slow file system take minutes
LOOK_S = 0.1
TOLD = 3
"""Failures that are told one by one; of later ones there is a line for each batch."""
Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class ProcessLimits:
    """seconds: of one call of the functions. memory_gib: of each of their processes. workers: processes. on_failure:
    `stop` raises for a sample that a function fails on; `zero` and `drop` score it nan, as no function may."""

    seconds: float = 120.0
    memory_gib: float = 8.0
    workers: int = 1
    on_failure: str = "stop"


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of some responses, and when they were there (time.perf_counter)."""

    scores: list[float]
    at_s: float


class Failed(Exception):
    """How a process of a reward failed: what it did, in words that follow the name of the reward."""

    def __init__(self, message: str, hint: str = "", sample: int | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.sample = sample


class Reward:
    """Reward functions under the names that the user gave, with their weights; a score is the weighted sum of theirs.
    Holds processes from `start` to `close`. columns: names of what comes beside the texts."""

    def __init__(
        self,
        functions: str | Mapping[str, float],
        limits: ProcessLimits = ProcessLimits(),
        columns: Sequence[str] = (),
    ) -> None:
        self._functions = {functions: 1.0} if isinstance(functions, str) else dict(functions)
        self._limits = limits
        self._columns = tuple(columns)
        self._told = itertools.count()
        self._workers: list[_Worker] = []
        self._threads = ThreadPoolExecutor(limits.workers, thread_name_prefix="reward")

    def start(self) -> None:
        """Start the processes, which load the function while this one does something else."""
        if not self._workers:
            self._workers = [_Worker(self._functions, self._limits, self._columns) for _ in range(self._limits.workers)]

    def ready(self) -> None:
        """Wait until the function is loaded. Raises RewardError when it cannot be, or takes unknown parameters."""
        self.start()
        for worker in self._workers:
            worker.ready()

    def submit(self, prompts: list[str], responses: list[str], columns: Columns | None = None) -> Future[Scored]:
        """Begin to score responses; the future has a score per response, or raises RewardError."""
        return self._gather(self._parts(prompts, responses, columns or {}))

    def __call__(self, prompts: list[str], responses: list[str], columns: Columns | None = None) -> list[float]:
        """One score per response, nan where its reward failed and need not stop the run. Raises RewardError."""
        return self.submit(prompts, responses, columns).result().scores

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.kill()
        self._workers = []
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _parts(self, prompts: list[str], responses: list[str], columns: Columns) -> list[Future[list[float]]]:
        self.start()
        count, parts = len(responses), min(len(self._workers), max(1, len(responses)))
        cuts = [count * i // parts for i in range(parts + 1)]
        found = []
        for worker, low, high in zip(self._workers, cuts[:-1], cuts[1:], strict=False):
            texts = {"prompts": prompts[low:high], "responses": responses[low:high]}
            values = {**{key: list(value[low:high]) for key, value in columns.items()}, **texts}
            found.append(self._threads.submit(self._score, worker, values, low))
        return found

    def _gather(self, parts: list[Future[list[float]]]) -> Future[Scored]:
        whole: Future[Scored] = Future()
        left = [len(parts)]

        def finish(_: object) -> None:
            left[0] -= 1  # callbacks of one executor may race only on the last part, and every part is final then
            if left[0] or whole.done():
                return
            error = next((e for part in parts if (e := part.exception()) is not None), None)
            if error is not None:
                whole.set_exception(error)
            else:
                whole.set_result(Scored([score for part in parts for score in part.result()], time.perf_counter()))

        for part in parts:
            part.add_done_callback(finish)
        return whole

    def _score(self, worker: _Worker, values: Mapping[str, list[Any]], first: int) -> list[float]:
        try:
            return worker.score(values, self._limits.seconds)
        except Failed as failure:
            if self._limits.on_failure != "stop":
                return self._each(worker, values)
            raise self._blame(worker, values, first, failure) from None

    def _each(self, worker: _Worker, values: Mapping[str, list[Any]]) -> list[float]:
        """Scores of the samples one by one, nan where that fails."""
        scores, untold = [], []
        for index, response in enumerate(values["responses"]):
            try:
                one = {key: value[index : index + 1] for key, value in values.items()}
                scores += worker.score(one, self._limits.seconds)
            except Failed as failure:
                scores.append(math.nan)
                untold.append(f"{_short(response)}: {failure}")
                if next(self._told) < TOLD:
                    self._tell(untold.pop())
        if untold:
            self._tell(f"{len(untold)} more of {len(scores)} responses, the last {untold[-1]}")
        return scores

    def _tell(self, what: str) -> None:
        verb = "0 for" if self._limits.on_failure == "zero" else "without"
        print(f"reward: {verb} {what}", file=sys.stderr, flush=True)

    def _blame(self, worker: _Worker, values: Mapping[str, list[Any]], first: int, failure: Failed) -> RewardError:
        """The error with the sample that did it: the function says which, or each sample is scored alone until one
        fails as the whole list did."""
        place, count = failure.sample, len(values["responses"])
        deadline = time.monotonic() + self._limits.seconds
        for index in range(count if place is None else 0):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            try:
                worker.score({key: value[index : index + 1] for key, value in values.items()}, left_s)
            except Failed as alone:
                place, failure = index, alone
                break
        if place is None or place >= count:
            return RewardError(f"{failure}, for {count} responses together", failure.hint)
        sample = f"sample {first + place}: prompt {_short(values['prompts'][place])}"
        return RewardError(
            f"{failure}, for {sample}, response {_short(values['responses'][place])}", failure.hint, first + place
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


class _Worker:
    """One process of a reward, started again after it was ended."""

    def __init__(self, functions: Mapping[str, float], limits: ProcessLimits, columns: Sequence[str]) -> None:
        self._functions = functions
        self._name = " + ".join(functions)
        self._limits = limits
        self._columns = columns
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def _start(self) -> None:
        child_reads, self._requests = os.pipe()
        self._replies, child_writes = os.pipe()
        arguments = child_reads, child_writes, os.getpid(), int(self._limits.memory_gib * 2**30), dict(self._functions)
        code = (
            f"import sys; sys.path[:] = {sys.path!a}; from runtime.batches.reward_worker import main; "
            f"main(*{arguments!a}, {tuple(self._columns)!a})"
        )
        self._buffer = b""
        self._ready = False
        with deaf_children():
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what the function prints is words, not data
                pass_fds=(child_reads, child_writes),
                start_new_session=True,
            )
        os.close(child_reads)
        os.close(child_writes)

    def ready(self) -> None:
        """Wait until the function is loaded. Raises RewardError."""
        if self._process is None:
            self._start()
        if self._ready:
            return
        try:
            self._answer(START_S, f"was not loaded after {START_S:g} s")
        except Failed as failure:
            self.kill()
            raise RewardError(str(failure), failure.hint) from None
        self._ready = True

    def score(self, values: Mapping[str, list[Any]], seconds: float) -> list[float]:
        """Scores of lists. Raises Failed, after which the process is gone or waits for the next lists."""
        self.ready()
        try:
            _write(self._requests, (json.dumps(values, default=str) + "\n").encode())
        except BrokenPipeError:
            self._died()
        limit = f"reward_limits.seconds = {self._limits.seconds:g} of the run file"
        scores: list[float] = self._answer(seconds, f"had not answered after {seconds:.3g} s", limit)["scores"]
        return scores

    def _answer(self, seconds: float, late: str, hint: str = "") -> dict[str, Any]:
        """The next line that the process writes."""
        assert self._process is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            readable, _, _ = select.select([self._replies], [], [], LOOK_S)
            if readable:
                part = os.read(self._replies, 1 << 20)
                self._buffer += part
                if not part:
                    self._died()
            elif self._process.poll() is not None:  # its own children may hold the pipe open
                self._died()
            elif time.monotonic() > deadline:
                self.kill()
                raise Failed(f"reward `{self._name}` {late}", hint)
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "message" in answer:
            raise Failed(answer["message"], answer.get("hint", ""), answer.get("sample"))
        return answer

    def _died(self) -> None:
        assert self._process is not None
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:  # it lives and has closed its pipes
            code = -signal.SIGKILL
        self.kill()
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
        hint = f"memory is limited by reward_limits.memory_gib = {self._limits.memory_gib:g}" if code < 0 else ""
        raise Failed(f"the process of reward `{self._name}` ended ({name})", hint)

    def kill(self) -> None:
        """End the process and everything that it has started."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        os.close(self._requests)
        os.close(self._replies)


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
