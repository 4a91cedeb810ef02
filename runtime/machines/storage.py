"""The checkpoints in the folder of one machine, of which other machines may hold the rest."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from plans.checkpoint_files import INDEX, CheckpointError, folder_of, read_index, step_folder, steps_in
from plans.checks import check_plan
from plans.codec import BadPlan, read_plan
from plans.files import free_name, writing
from plans.plan import ExecutionPlan
from plans.runfile import CHECKPOINTS, RunFile
from plans.seals import Seal, seal_of
from runtime.checkpoints.complete import put_in_place
from runtime.checkpoints.folder import partial_folder, rank_word, remove_after
from runtime.machines.files import FileServer, Wanted, fetch
from runtime.machines.takeover import drop_resumed, served_name, take_masters, take_needed
from runtime.machines.wire import Message

SEEN_S, LOOK_S = 30.0, 0.1
"""How long a new file may take to show on another machine of a network file system, and how often to look."""
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay"}
"""File systems of one machine alone, where a file shows at once or never."""


class Storage:
    """Does what the first machine asks of a checkpoint folder, and serves its files to the other machines."""

    def __init__(self, run: RunFile, host: str) -> None:
        self._run, self._folder = run, run.checkpoint_folder
        self._other = other_folder(run)
        self.files = FileServer(host, self._folder)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self._told: set[int] = set()
        self._took = False

    def close(self) -> None:
        """Serve no more, and fetch nothing that has not begun."""
        self.files.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._drop()

    def _drop(self) -> None:
        """Remove what was taken for this machine's ranks."""
        if self._took:
            for other in (False, True):
                drop_resumed(taken_in(self._run, other=other))

    def probe(self, name: str) -> Message:
        """Leave a file by which other machines find out whether they see this folder."""
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / name).touch()
        return {}

    def sees(self, names: Sequence[str]) -> Future[Message]:
        """Which of the files of the other machines show here; a machine's own one always does."""
        wait_s = 0.0 if file_system(self._folder) in _LOCAL else SEEN_S
        return self._pool.submit(_shown, self._folder, names, wait_s)

    def unprobe(self, name: str) -> Message:
        """Remove that file."""
        (self._folder / name).unlink(missing_ok=True)
        return {}

    def inventory(self, *, other: bool = False) -> Message:
        """The checkpoints that have an index here, the newest first: the seals of their files, the index last,
        and which of them are here with their size. other: those of the other run that this one goes on from, which are
        served from now on."""
        steps, place = [], self._other if other else self._folder
        for folder in steps_in(place) if place is not None else ():
            try:
                index = read_index(folder)
            except CheckpointError:
                continue
            seals = index.files | {INDEX: seal_of(folder / INDEX)}
            files = {name: seal.model_dump(exclude_none=True) for name, seal in seals.items()}
            here = [name for name, seal in seals.items() if _size(folder / name) == seal.bytes]
            if other:
                self.files.more |= {f"{served_name(folder.name, other=True)}/{name}": folder / name for name in here}
            steps.append({"iteration": index.iteration, "digest": index.digest, "files": files, "here": here})
        return {"steps": steps}

    def parts(self, ranks: Sequence[int]) -> Iterator[Message]:
        """Checkpoints of which the parts of some ranks are here since this was last asked."""
        for partial in sorted(self._folder.glob(".global_step_*.partial")):
            iteration = int(partial.name.removeprefix(".global_step_").removesuffix(".partial"))
            words = [partial / rank_word(rank) for rank in ranks]
            if iteration not in self._told and all(os.path.isfile(word) for word in words):
                self._told.add(iteration)
                yield {"iteration": iteration, "words": [word.read_text(encoding="utf-8") for word in words]}

    def begin(self) -> None:
        """Forget which checkpoints were told: another attempt begins."""
        self._told.clear()

    def fetch_part(self, iteration: int, files: Sequence[Any]) -> Future[None]:
        """Have files of a checkpoint that is not whole yet, beside those of this machine."""
        partial = partial_folder(self._folder, iteration)
        return self._pool.submit(_fetch_all, partial, partial.name, _wanted(files))

    def fetch_step(self, iteration: int, files: Sequence[Any]) -> Future[None]:
        """Have files of a checkpoint that stands on other machines."""
        return self._pool.submit(self._fetch_step, step_folder(self._folder, iteration), _wanted(files))

    def _fetch_step(self, final: Path, files: Sequence[Wanted]) -> None:
        if os.path.isdir(final):
            _fetch_all(final, final.name, files)
            return
        aside = final.with_name(f".{final.name}.fetched")  # without a whole set of files it has no name
        _fetch_all(aside, final.name, files)
        aside.rename(final)

    def take_needed(
        self, iteration: int, plan: str, ranks: Sequence[int], files: Sequence[Any], *, other: bool = False
    ) -> Future[Message]:
        """Have what some ranks of a plan read of a checkpoint that stands on several machines, of the run's own or of
        the `other` run's."""
        planned, wanted, self._took = planned_from(plan), _wanted(files), True
        folder = taken_in(self._run, other=other)
        return self._pool.submit(take_needed, folder, iteration, planned, ranks, wanted, self._other if other else None)

    def take_masters(self, iteration: int, role: str, files: Sequence[Any]) -> Future[Message]:
        """Have what an export of a role reads of a checkpoint that stands on several machines."""
        wanted, self._took = _wanted(files), True
        return self._pool.submit(take_masters, self._folder, iteration, role, wanted)

    def finish(self, iteration: int, texts: dict[str, str]) -> Message:
        """Give a checkpoint of which every slice lies on two machines its index and its name."""
        partial_folder(self._folder, iteration).mkdir(parents=True, exist_ok=True)
        put_in_place(self._folder, iteration, texts, self._run.checkpoint.keep)
        self._drop()  # ranks have read it long ago
        return {}

    def forget(self, after: int) -> Message:
        """Remove the checkpoints after so many iterations."""
        remove_after(self._run, after)
        return {}

    def set_aside(self) -> Message:
        """Move checkpoints of an earlier run out of the way of a new one, as the first machine does with its output."""
        if not self._run.checkpoint.folder and steps_in(self._folder):
            place = free_name(Path(self._run.output).resolve())
            with writing(place):
                place.mkdir()
                self._folder.rename(place / CHECKPOINTS)
        return {}


def other_folder(run: RunFile) -> Path | None:
    """The folder of the checkpoints of another run that this one goes on from; None for its own, and for none."""
    if not run.resume_from:
        return None
    place, folder = Path(run.resume_from), run.checkpoint_folder.resolve()
    return None if folder in (place.resolve(), folder_of(place).resolve()) else folder_of(place)


def taken_in(run: RunFile, *, other: bool) -> Path:
    """The folder in which a machine has what it takes of a checkpoint: beside the run's own, but for the `other` run's
    in the output, since the run's own folder of checkpoints may yet be moved aside."""
    return Path(run.output) if other else run.checkpoint_folder


def planned_from(text: str) -> ExecutionPlan:
    """The plan that the first machine has sent. Raises BadPlan."""
    plan, problems = read_plan(text)
    if plan is None or (problems := check_plan(plan)):
        raise BadPlan("the plan of the first machine", problems)
    return plan


def file_system(folder: Path) -> str:
    """Type of the file system that a folder is on, such as `ext4` or `nfs4`; empty where the system does not say."""
    found, longest, place = "", -1, str(folder.resolve())
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return ""
    for line in lines:
        mount, _, rest = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), mount.split(" ")[4])
        within = place == point or place.startswith(f"{point.rstrip('/')}/")
        if within and len(point) >= longest:  # of two at one place the later one hides the other
            found, longest = rest.split(" ")[0], len(point)
    return found


def _shown(folder: Path, names: Sequence[str], wait_s: float) -> Message:
    """Which files of a folder show, after a wait for those that do not."""
    deadline = time.monotonic() + wait_s
    while True:
        # A client of a network file system remembers that a name was not there; to list the folder has it ask again.
        there = set(os.listdir(folder))
        found = [name for name in names if name in there]
        if len(found) == len(names) or time.monotonic() > deadline:
            return {"seen": found}
        time.sleep(LOOK_S)


def _size(path: Path) -> int:
    return path.stat().st_size if os.path.isfile(path) else -1


def _wanted(files: Sequence[Any]) -> list[Wanted]:
    return [Wanted(str(f["name"]), Seal.model_validate(f["seal"]), [tuple(s) for s in f["sources"]]) for f in files]


def _fetch_all(folder: Path, step: str, files: Sequence[Wanted]) -> None:
    for wanted in files:
        fetch(folder, wanted, step)
