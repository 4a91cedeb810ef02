"""What each rank writes down while it runs: its present step, and per iteration its spans and statistics.

Small files in one folder, so that the launching process can read them at any time, also after a rank was killed; no
collective is needed and no mesh waits for another.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from plans.files import writing
from plans.program import Step, StepKind
from runtime.reports.stats import Stat, merge_stats

STATUS_BYTES = 512
RESERVE_BYTES = 2**14


@dataclass(frozen=True, slots=True)
class Status:
    """Where a rank is: its process, the step and iteration it works on (step empty before the first one), since when
    (time.time), whether it has done everything, and, of a step that is long, the operation that it waits in."""

    pid: int
    step: str
    iteration: int
    since_s: float = 0.0
    done: bool = False
    operation: str = ""

    @property
    def place(self) -> str:
        """Where the rank is, in words."""
        if not self.step:
            return "while it started"
        inside = f", in `{self.operation}`" if self.operation else ""
        return "done" if self.done else f"in iteration {self.iteration}, step `{self.step}`{inside}"

    def line(self, rank: int, now_s: float) -> str:
        """Where the rank is, and for how long it is in that step. now_s: time.time()."""
        return f"rank {rank}: {self.place} for {max(0.0, now_s - self.since_s):.0f} s"


@dataclass(frozen=True, slots=True)
class Record:
    """One iteration of one rank. spans: (name, kind, start_s, end_s) from the start of the run. samples: lines of
    `samples.jsonl`."""

    rank: int
    iteration: int
    spans: tuple[tuple[str, str, float, float], ...]
    stats: Mapping[str, Stat]
    samples: tuple[Mapping[str, Any], ...] = ()


def status_path(folder: Path, rank: int) -> Path:
    """A rank's status file."""
    return folder / f"status-{rank}"


def records_path(folder: Path, rank: int) -> Path:
    """A rank's records, one JSON line per iteration."""
    return folder / f"records-{rank}.jsonl"


def reserve_path(folder: Path, rank: int) -> Path:
    """Room on the disk that a rank holds for its last word: it is removed where the disk is full."""
    return folder / f"reserve-{rank}"


def crash_path(folder: Path, rank: int) -> Path:
    """Where a rank's stacks go when a signal ends it."""
    return folder / f"crash-{rank}"


def read_status(folder: Path, rank: int) -> Status | None:
    """What a rank last said; None before it has started."""
    try:
        text = status_path(folder, rank).read_text("utf-8")
        return Status(**json.loads(text)) if text else None
    except (OSError, ValueError, TypeError):
        return None


class Records(Protocol):
    """What an executor tells while it runs."""

    def say(self, step: str, iteration: int, *, done: bool = False) -> None:
        """Where this rank is."""

    def span(self, step: Step, iteration: int) -> AbstractContextManager[None]:
        """Measure a step."""

    def add_span(self, name: str, kind: StepKind, iteration: int, start_s: float, end_s: float) -> None:
        """Keep a span that was measured."""

    def add(self, iteration: int, stats: Mapping[str, Stat]) -> None:
        """Keep statistics of an iteration."""

    def show(self, iteration: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Keep samples that a person looks at."""

    def finish(self, iteration: int) -> None:
        """This rank has done everything of an iteration."""


class Recorder:
    """Writes a rank's status and records. `origin_s` is the time (time.time) at which the run started. `status`: what
    it has said last."""

    def __init__(self, folder: Path, rank: int, origin_s: float) -> None:
        self._rank, self._folder = rank, folder
        self._writes = Lock()
        with writing(folder):
            self._open(folder, rank)
        self._shift_s = time.time() - time.perf_counter() - origin_s
        self._spans: dict[int, list[tuple[str, str, float, float]]] = {}
        self._stats: dict[int, dict[str, list[Stat]]] = {}
        self._samples: dict[int, list[Mapping[str, Any]]] = {}
        self.say("", 0)

    def _open(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        reserve_path(folder, rank).write_bytes(bytes(RESERVE_BYTES))
        self._descriptor = os.open(status_path(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._records = records_path(folder, rank).open("wb", buffering=0)

    def say(self, step: str, iteration: int, *, done: bool = False) -> None:
        """Update the status file, in one write that leaves no half."""
        with self._writes:
            self._write(Status(os.getpid(), step, iteration, time.time(), done))

    def tell(self, status: Status, operation: str) -> None:
        """Add the operation that this rank waits in to what it has said last, where that is `status`. Any thread."""
        with self._writes:
            if self.status is status and operation != status.operation:
                self._write(replace(status, operation=operation))

    def _write(self, status: Status) -> None:
        self.status = status
        with writing(status_path(self._folder, self._rank)):
            os.pwrite(self._descriptor, json.dumps(asdict(status)).ljust(STATUS_BYTES).encode(), 0)

    @contextmanager
    def span(self, step: Step, iteration: int) -> Iterator[None]:
        """Measure a step. Releases take no time worth a span; a function ends later than the step that begins it."""
        start = time.perf_counter()
        yield
        if step.kind not in (StepKind.RELEASE, StepKind.FUNCTION):
            self.add_span(step.name, step.kind, iteration, start, time.perf_counter())

    def add_span(self, name: str, kind: StepKind, iteration: int, start_s: float, end_s: float) -> None:
        """Keep a span that was measured with time.perf_counter."""
        span = (name, str(kind), start_s + self._shift_s, end_s + self._shift_s)
        self._spans.setdefault(iteration, []).append(span)

    def add(self, iteration: int, stats: Mapping[str, Stat]) -> None:
        """Keep statistics of an iteration."""
        for name, stat in stats.items():
            self._stats.setdefault(iteration, {}).setdefault(name, []).append(stat)

    def show(self, iteration: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Keep samples that a person looks at."""
        self._samples.setdefault(iteration, []).extend(samples)

    def finish(self, iteration: int) -> None:
        """Write an iteration of which this rank has done everything."""
        stats = {name: merge_stats(parts) for name, parts in self._stats.pop(iteration, {}).items()}
        line: dict[str, Any] = {
            "iteration": iteration,
            "spans": self._spans.pop(iteration, []),
            "stats": {name: [s.total, s.count, s.low, s.high] for name, s in stats.items()},
            "samples": self._samples.pop(iteration, []),
        }
        left = json.dumps(line).encode() + b"\n"
        with writing(records_path(self._folder, self._rank)):
            while left:
                left = left[self._records.write(left) :]


class NewLines:
    """The lines of JSON that a file has gained since it was last read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """New whole lines; none while there is no file. A file that was begun anew is read from its start."""
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def lines_before(path: Path, iteration: int) -> list[str]:
    """The whole lines of a file that a run wrote before an iteration, from which it goes on; none without the file."""
    if not os.path.isfile(path):
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] < iteration]


class RecordReader:
    """Reads the records of some ranks as they appear, from iteration `first` on."""

    def __init__(self, folder: Path, ranks: tuple[int, ...], first: int = 0) -> None:
        self._files = {rank: NewLines(records_path(folder, rank)) for rank in ranks}
        self._waiting: dict[int, dict[int, Record]] = {}
        self._next = first

    def poll(self) -> Iterator[tuple[Record, ...]]:
        """The records of each iteration that all ranks have finished by now, in order, once."""
        for rank in self._files:
            for record in self._new(rank):
                self._waiting.setdefault(record.iteration, {})[rank] = record
        while len(self._waiting.get(self._next, ())) == len(self._files):
            found = self._waiting.pop(self._next)
            self._next += 1
            yield tuple(found[rank] for rank in sorted(found))

    def _new(self, rank: int) -> Iterator[Record]:
        for data in self._files[rank].read():
            stats = {name: Stat(*values) for name, values in data["stats"].items()}
            spans = tuple((name, kind, start, end) for name, kind, start, end in data["spans"])
            yield Record(rank, data["iteration"], spans, stats, tuple(data["samples"]))
