"""Checkpoints become whole: the process that keeps the files of a run waits for every rank's part, adds what it knows,
gives the folder its name and removes the oldest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

from plans.checkpoint_files import (
    INDEX,
    NEWEST,
    RankIndex,
    joined,
    sealed_index,
    step_folder,
    steps_in,
)
from plans.files import write_atomically
from plans.run_output import METRICS, PLAN, RUN
from plans.runfile import RunFile
from plans.seals import Seal, Sealer
from runtime.checkpoints.folder import RANK_WORDS, partial_folder, rank_word, sync_folder

POLL_S = 0.2


class Completer:
    """Completes the checkpoints of a run in a thread, and once more on leaving. `ranks`: how many write.

    All machines see one folder. Where they do not, `runtime.machines.keeper` does the same over several.
    """

    def __init__(self, run: RunFile, ranks: int) -> None:
        self._folder, self._output = run.checkpoint_folder, Path(run.output)
        self._keep, self._ranks = run.checkpoint.keep, ranks
        self._stop = Event()
        self._thread = Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Completer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.poll()

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            with suppress(OSError):  # a full disk: the ranks say so; the last poll, on leaving, does not hide it
                self.poll()

    def poll(self) -> None:
        """Complete every checkpoint of which all parts are there."""
        for partial in sorted(self._folder.glob(".global_step_*.partial")):
            iteration = int(partial.name.removeprefix(".global_step_").removesuffix(".partial"))
            words = [partial / rank_word(rank) for rank in range(self._ranks)]
            metrics = lines_done(self._output, iteration)
            if metrics is not None and all(os.path.isfile(word) for word in words):
                parts = [RankIndex.model_validate_json(word.read_text(encoding="utf-8")) for word in words]
                put_in_place(self._folder, iteration, texts_beside(self._output, parts, metrics), self._keep)


def lines_done(output: Path, iteration: int) -> str | None:
    """The metrics of the iterations that are in a checkpoint; None while the last of them is not written."""
    try:
        lines = (output / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return None
    return "".join(lines[:iteration]) if len(lines) >= iteration else None


def texts_beside(output: Path, parts: Sequence[RankIndex], metrics: str) -> dict[str, str]:
    """The files of a checkpoint that no rank writes, by name: plan, run file, metrics, and the index of all files."""
    texts = {name: (output / name).read_text(encoding="utf-8") for name in (PLAN, RUN)} | {METRICS: metrics}
    index, seals = joined(parts), {name: _seal(text) for name, text in texts.items()}
    return texts | {INDEX: sealed_index(index.model_copy(update={"files": seals | index.files}))}


def put_in_place(folder: Path, iteration: int, texts: Mapping[str, str], keep: int) -> None:
    """Put the files that no rank writes beside those of the ranks, the index last, give the checkpoint its name, and
    remove all but the newest `keep` up to it. It replaces one of that name. Later ones were refused at the start."""
    partial, final = partial_folder(folder, iteration), step_folder(folder, iteration)
    for word in partial.glob(RANK_WORDS):
        word.unlink()
    for name, text in texts.items():
        (partial / name).write_text(text, encoding="utf-8")
        _sync(partial / name)
    sync_folder(partial)
    _remove(final)
    partial.rename(final)
    write_atomically(folder / NEWEST, f"{iteration}\n")
    sync_folder(folder)
    there = steps_in(folder)
    for old in there[there.index(final) + keep :]:
        _remove(old)


def _seal(text: str) -> Seal:
    sealer = Sealer()
    sealer.update(memoryview(text.encode()))
    return sealer.seal


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _remove(checkpoint: Path) -> None:
    """Take the name away first: what is half removed is no checkpoint."""
    aside = checkpoint.with_name(f".{checkpoint.name}.old")
    if os.path.exists(checkpoint):
        checkpoint.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
