"""Many attempts in forked processes, so that a crash or a hang is one failure and not the end of all."""

from __future__ import annotations

import json
import os
import select
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 20.0
TICK = 0.5
CHUNK = 500


@dataclass(frozen=True)
class Outcome:
    """What became of an input: its kind, and of a refusal whether it had a hint, and a place where there is one.

    said: what was said without a hint.
    """

    kind: str
    refused: bool = False
    hinted: bool = False
    placed: bool = False
    has_place: bool = False
    said: str = ""


@dataclass
class Tally:
    """Counts of outcomes, and what went wrong: tracebacks, crashes, hangs, wrong successes."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    without_hint: list[str] = field(default_factory=list)

    def add(self, found: Outcome) -> None:
        """Count an outcome."""
        for what in ("refused", "hinted", "placed", "has_place"):
            self.counts[found.kind, what] += getattr(found, what)
        self.counts[found.kind, "tried"] += 1
        if found.refused and not found.hinted:
            self.without_hint.append(f"{found.kind}: {found.said}")

    def of(self, what: str, kind: str = "") -> int:
        """How many outcomes of a kind (empty: all) were so."""
        return sum(n for (k, w), n in self.counts.items() if w == what and kind in ("", k))

    @property
    def kinds(self) -> list[str]:
        """Every kind that was tried."""
        return sorted({kind for kind, _ in self.counts})

    def text(self) -> str:
        """A line per kind."""
        heads = ("tried", "refused", "hinted", "has_place", "placed")
        lines = [f"{'kind':28}" + "".join(f"{head:>11}" for head in heads)]
        for kind in [*self.kinds, ""]:
            lines.append(f"{kind or 'all':28}" + "".join(f"{self.of(head, kind):>11,}" for head in heads))
        return "\n".join(lines)


def attempts(numbers: Sequence[int], attempt: Callable[[int], Outcome], tally: Tally) -> None:
    """Try every number in forked processes, `CHUNK` in each; after a crash or a hang another goes on with the rest."""
    left = list(numbers)
    while left:
        left = _child(left[:CHUNK], attempt, tally) + left[CHUNK:]


class Watch:
    """How long a process has had for one input, without what other processes took of the machine.

    The longer of its CPU seconds, which a loop uses up, and of the seconds in which it was seen asleep, as in waiting
    for a lock. While it is ready and gets no CPU, nothing is counted.
    """

    def __init__(self, pid: int) -> None:
        self.pid, self.at, self.asleep = pid, time.monotonic(), 0.0
        self.used = self._state()[1]

    def seconds(self) -> float:
        """So far; what the process did since the last look is taken for what it does now."""
        state, used = self._state()
        now, before = time.monotonic(), self.at
        self.at = now
        self.asleep += (now - before) * (state in "ST")
        return max(self.asleep, used - self.used)

    def _state(self) -> tuple[str, float]:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _child(numbers: list[int], attempt: Callable[[int], Outcome], tally: Tally) -> list[int]:
    """Those of the numbers that were not tried."""
    reads, writes = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reads)
        _serve(writes, numbers, attempt)
    os.close(writes)
    buffer, done, watch, ready = b"", 0, Watch(pid), [reads]
    try:
        while done < len(numbers):
            ready, _, _ = select.select([reads], [], [], TICK)
            if not ready:
                if watch.seconds() >= SECONDS:
                    break
                continue
            if not (part := os.read(reads, 1 << 16)):
                break
            buffer += part
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                words = json.loads(line)
                done += 1
                tally.failures.append(words) if isinstance(words, str) else tally.add(Outcome(**words))
            watch = Watch(pid)
    finally:
        os.close(reads)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if done < len(numbers):
        what = f"no answer after {SECONDS:g} s" if not ready else f"died (wait status {status})"
        tally.failures.append(f"input {numbers[done]}: {what}")
    return numbers[done + 1 :]


def _serve(writes: int, numbers: list[int], attempt: Callable[[int], Outcome]) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    for number in numbers:
        try:
            words: object = vars(attempt(number))
        except BaseException:
            words = f"input {number}: {traceback.format_exc()[-3000:]}"
        os.write(writes, json.dumps(words).encode() + b"\n")
    signal.pause()  # the parent ends this process: nothing of it runs at its exit
