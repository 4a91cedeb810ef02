"""Checkpoints become whole: the process that keeps the files of a run waits for every rank's part, adds what it knows,
gives the folder its name and removes the oldest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
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
from plans.seals import seal_of
from runtime.checkpoints.folder import partial_folder, rank_word, sync_folder

POLL_S = 0.2


class Completer:
    """Completes the checkpoints of a run in a thread, and once more on leaving. `ranks`: how many write.

    All machines see one folder. Where they do not, each storage needs a completer for the words of its ranks.
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

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint that stands."""
        return next(iter(steps_in(self._folder)), None)

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            with suppress(OSError):  # a full disk: the ranks say so; the last poll, on leaving, does not hide it
                self.poll()

    def poll(self) -> None:
        """Complete every checkpoint of which all parts are there."""
        for partial in sorted(self._folder.glob(".global_step_*.partial")):
            iteration = int(partial.name.removeprefix(".global_step_").removesuffix(".partial"))
            words = [partial / rank_word(rank) for rank in range(self._ranks)]
            metrics = self._metrics(iteration)
            if metrics is not None and all(os.path.isfile(word) for word in words):
                complete(self._folder, self._output, iteration, words, metrics)
                self._prune(iteration)

    def _metrics(self, iteration: int) -> str | None:
        """The lines of the iterations that are in a checkpoint; None while the last of them is not written."""
        try:
            lines = (self._output / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            return None
        return "".join(lines[:iteration]) if len(lines) >= iteration else None

    def _prune(self, iteration: int) -> None:
        """Remove all but the newest checkpoints up to this one. Later ones are such as were refused at the start."""
        number = steps_in(self._folder).index(step_folder(self._folder, iteration))
        for old in steps_in(self._folder)[number + self._keep :]:
            _remove(old)


def complete(folder: Path, output: Path, iteration: int, words: Sequence[Path], metrics: str) -> None:
    """Write the index of a checkpoint and what goes with it, and give it its name. It replaces one of that name."""
    partial, final = partial_folder(folder, iteration), step_folder(folder, iteration)
    parts = [RankIndex.model_validate_json(word.read_text(encoding="utf-8")) for word in words]
    shutil.copyfile(output / PLAN, partial / PLAN)
    shutil.copyfile(output / RUN, partial / RUN)
    (partial / METRICS).write_text(metrics, encoding="utf-8")
    index = joined(parts)
    seals = {name: seal_of(partial / name) for name in (PLAN, RUN, METRICS)}
    (partial / INDEX).write_text(
        sealed_index(index.model_copy(update={"files": seals | index.files})), encoding="utf-8"
    )
    for word in words:
        word.unlink()
    for name in (*seals, INDEX):
        _sync(partial / name)
    sync_folder(partial)
    _remove(final)
    partial.rename(final)
    write_atomically(folder / NEWEST, f"{iteration}\n")
    sync_folder(folder)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _remove(checkpoint: Path) -> None:
    """Take the name away first: what is half removed is no checkpoint."""
    aside = checkpoint.with_name(f".{checkpoint.name}.old")
    if os.path.exists(checkpoint):
        checkpoint.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
