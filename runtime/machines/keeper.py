"""Checkpoints over machines without a folder in common: a copy of every slice on a second one, then an index on each.

Machines that see one folder are one *storage*, for which the first of them acts. Storages stand in a ring, and each
fetches the files of the one before it, so that the loss of one loses nothing. With one storage nothing is copied.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from plans.checkpoint_files import RankIndex
from runtime.checkpoints.complete import lines_done, texts_beside
from runtime.machines.machines import POLL_S, Machines
from runtime.machines.wire import Message


def _ring(storages: Mapping[int, Sequence[int]]) -> list[int]:
    """The storages that keep checkpoints. One without ranks has the second copy where only one has any."""
    writers = sorted(node for node, ranks in storages.items() if ranks)
    idle = [node for node in storages if node not in writers]
    return writers + (idle[:1] if len(writers) == 1 else [])


def lying(storages: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """For each storage the ranks whose parts of checkpoints come to lie there: its own, and those of the one before it
    in the ring."""
    ring, found = _ring(storages), {node: list(ranks) for node, ranks in storages.items()}
    for before, node in zip([ring[-1], *ring] if len(ring) > 1 else (), ring, strict=False):
        found[node] += storages[before]
    return found


@dataclass
class _Making:
    """A checkpoint that is not whole yet: what the ranks of each storage have written, and what was asked last."""

    parts: dict[int, list[RankIndex]] = field(default_factory=dict)
    asked: dict[int, int] = field(default_factory=dict)
    copied: bool = False


class Keeper:
    """Makes the checkpoints of an attempt whole. storages: the machine that acts for each, and the ranks that write
    there; none where the run keeps no checkpoints."""

    def __init__(self, machines: Machines, storages: Mapping[int, Sequence[int]], output: Path, patience_s: float):
        self._machines, self._output, self._patience_s = machines, output, patience_s
        self._writers = {node for node, ranks in storages.items() if ranks}
        self._ring = _ring(storages)
        self._making: dict[int, _Making] = {}

    def __enter__(self) -> Keeper:
        self._machines.handlers["part"] = self._part
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what can still become whole; what a lost machine had a part of cannot."""
        end = monotonic() + self._patience_s
        while self._waits() and monotonic() < end:
            self._machines.pump(POLL_S)
            self.poll()
        del self._machines.handlers["part"]

    def _part(self, node: int, message: Message) -> None:
        parts = [RankIndex.model_validate_json(word) for word in message["words"]]
        self._making.setdefault(int(message["iteration"]), _Making()).parts[node] = parts

    def _waits(self) -> bool:
        """Whether a checkpoint of which all parts are written waits for machines that are all there."""
        there = self._machines.there
        if any(node not in there for node in self._ring):
            return False
        return any(
            set(making.parts) == self._writers and lines_done(self._output, iteration) is not None
            for iteration, making in self._making.items()
        )

    def poll(self) -> None:
        """Go on with every checkpoint as far as it can."""
        for iteration, making in sorted(self._making.items()):
            if set(making.parts) == self._writers and self._advance(iteration, making):
                del self._making[iteration]

    def _advance(self, iteration: int, making: _Making) -> bool:
        """Ask for the next step where the last one is answered; whether there is none left."""
        metrics = lines_done(self._output, iteration)
        if metrics is None:  # the last iteration has no line yet, or gets none because it is a bad one
            return False
        if not making.asked:
            self._copy(iteration, making)
        for node in list(making.asked):
            answer = self._machines.answer(making.asked[node])
            if answer is not None:
                del making.asked[node]
                if "error" in answer:
                    print(f"checkpoint {iteration}: {self._machines.words(node)}: {answer['error']}", file=sys.stderr)
                    return True
        if making.asked:
            return False
        if making.copied:
            return True
        making.copied = True
        texts = texts_beside(self._output, [part for parts in making.parts.values() for part in parts], metrics)
        making.asked = {
            node: self._machines.send(node, "finish", iteration=iteration, texts=texts) for node in self._ring
        }
        return False

    def _copy(self, iteration: int, making: _Making) -> None:
        """Have every storage fetch what the one before it in the ring has."""
        for before, node in zip([self._ring[-1], *self._ring], self._ring, strict=False):
            files: list[Message] = []
            if before != node and before in self._machines.there:
                source = self._machines.there[before].source
                files = [
                    {"name": name, "seal": seal.model_dump(exclude_none=True), "sources": [source]}
                    for part in making.parts.get(before, ())
                    for name, seal in part.files.items()
                ]
            making.asked[node] = self._machines.send(node, "fetch_part", iteration=iteration, files=files)
