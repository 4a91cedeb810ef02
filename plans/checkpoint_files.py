"""The files of a checkpoint: what stands in its folder, whether it is whole, and whether a plan can take it up.

    global_step_20/
      index.json          the iterations done, step counts, every entry and its file, size and checksums of every file
      plan.json           the plan that wrote it
      run.yaml            its run file
      metrics.jsonl       a line per iteration done
      rank-00000.safetensors ...

The index is written last and the folder gets its name last, so that what has the name is whole unless it was damaged
since. Light: `realplan check` reads it without torch.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from plans.checkpoint import Entry, missing
from plans.codec import load_plan
from plans.documents import BadText, parse_json, read_text
from plans.errors import RealplanError
from plans.flat_tensors import tensors_fault
from plans.plan import ExecutionPlan
from plans.run_output import METRICS, PLAN, RUN
from plans.runfile import CHECKPOINTS
from plans.seals import Seal, altered

INDEX = "index.json"
NEWEST = "latest_checkpointed_iteration.txt"  # the name that Megatron and verl use
MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
MASTER_BYTES = 4
STATE_BYTES = 12  # master and two moments of a parameter, float32
MOST_INDEX_BYTES = 2**30
_PREFIX = "global_step_"
Number = Annotated[int, Field(ge=0, le=10**15)]


class CheckpointError(RealplanError):
    """A checkpoint that cannot be used."""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


class RoleState(_Closed):
    """Counters of a trained role: optimizer steps, which the learning rate follows, and the steps that Adam has made,
    0 when it has no moments yet. kl_coefficient: where it adapts, that of the next iteration."""

    steps: Number
    adam_steps: Number
    kl_coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class StoredEntry(_Closed):
    """An entry of a role's training state; its tensors lie under `tensor(kind)` in `file`."""

    role: str
    parameter: str
    part: Number
    parts: Annotated[int, Field(ge=1)]
    start: Number
    stop: Number
    file: str

    @property
    def entry(self) -> Entry:
        """The elements, as the arithmetic knows them."""
        return Entry(self.parameter, self.part, self.parts, self.start, self.stop)

    def tensor(self, kind: str) -> str:
        """Name of the tensor of a kind: `master`, `exp_avg` or `exp_avg_sq`."""
        return f"{self.role}/{self.parameter}/{self.part}of{self.parts}/{self.start}-{self.stop}/{kind}"


class RankIndex(_Closed):
    """What one rank has written: its word that its file is whole."""

    iteration: Number
    rank: Number
    roles: dict[str, RoleState]
    entries: list[StoredEntry]
    files: dict[str, Seal]


class CheckpointIndex(_Closed):
    """The index of a checkpoint. `digest`: SHA-256 of all the rest, as `digest_of` writes it."""

    format: Literal["realplan-checkpoint/1"] = "realplan-checkpoint/1"
    iteration: Number
    roles: dict[str, RoleState]
    entries: list[StoredEntry]
    files: dict[str, Seal]
    digest: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose index has been read. The plan is the one that wrote it."""

    folder: Path
    index: CheckpointIndex
    plan: ExecutionPlan

    @property
    def absent(self) -> list[str]:
        """The files that are not here: machines without a folder in common have two copies of each together."""
        return sorted(name for name in self.index.files if not os.path.lexists(self.folder / name))


def step_folder(folder: Path, iteration: int) -> Path:
    """Where the checkpoint after `iteration` iterations stands."""
    return folder / f"{_PREFIX}{iteration}"


def steps_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder by name, the newest first."""
    if not os.path.isdir(folder):
        return []
    numbers = (path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*") if os.path.isdir(path))
    return [
        step_folder(folder, n) for n in sorted((int(n) for n in numbers if n.isascii() and n.isdigit()), reverse=True)
    ]


def joined(parts: Sequence[RankIndex]) -> CheckpointIndex:
    """The index of what all ranks have written."""
    roles = {role: state for part in parts for role, state in part.roles.items()}
    files = {name: seal for part in parts for name, seal in part.files.items()}
    entries = [entry for part in parts for entry in part.entries]
    return CheckpointIndex(iteration=parts[0].iteration, roles=roles, entries=entries, files=files)


def sealed_index(index: CheckpointIndex) -> str:
    """The text of `index.json`."""
    return index.model_copy(update={"digest": digest_of(index)}).model_dump_json(exclude_none=True) + "\n"


def digest_of(index: CheckpointIndex) -> str:
    """SHA-256 of an index without its own digest and without what it does not say."""
    return hashlib.sha256(index.model_dump_json(exclude={"digest"}, exclude_none=True).encode()).hexdigest()


def open_checkpoint(folder: Path, *, whole: bool = True) -> Checkpoint:
    """Read the index of a checkpoint and hold it against itself and against the sizes of its files. whole: all files
    must be here; where it is False, those of ranks may lie on other machines, if its plan has several.

    Raises CheckpointError, which names the folder, for what is no checkpoint, torn or altered.
    """
    index = read_index(folder)
    written = {entry.file for entry in index.entries}
    absent = {name for name in written & index.files.keys() if not os.path.lexists(folder / name)}
    for name, seal in index.files.items():
        path = folder / name
        if Path(name).name != name or (name not in absent and (not os.path.isfile(path) or path.is_symlink())):
            raise _refused(folder, f"`{name}` is missing")
        if name not in absent and path.stat().st_size != seal.bytes:
            raise _refused(folder, f"`{name}` has {path.stat().st_size:,} bytes, not {seal.bytes:,}")
    if lacking := {PLAN, RUN, METRICS, *written} - index.files.keys():
        raise _refused(folder, f"its index lacks `{min(lacking)}`")
    if fault := altered(folder, {PLAN: index.files[PLAN]}):
        raise _refused(folder, fault)
    try:
        plan = load_plan(folder / PLAN)
    except RealplanError as error:
        raise _refused(folder, f"its plan cannot be read: {str(error).splitlines()[0]}") from None
    if absent and (whole or plan.cluster.nodes == 1):
        raise _refused(folder, *_elsewhere(sorted(absent), plan))
    for role in index.roles:
        own = [entry.entry for entry in index.entries if entry.role == role]
        fault = missing(plan.workload.models[role], own) if role in plan.workload.models else f"no model `{role}`"
        if fault:
            raise _refused(folder, f"state of `{role}`: {fault}")
    for name, tensors in _tensors(index).items():
        if name not in absent and (fault := tensors_fault(folder / name, tensors)):
            raise _refused(folder, fault)
    return Checkpoint(folder, index, plan)


def _elsewhere(absent: Sequence[str], plan: ExecutionPlan) -> tuple[str, str]:
    """Which files are not here, and a hint where they are likely to be: on the node of the rank that wrote each, and in
    second copies on the next one."""
    why = f"{_listed(absent)} {'is' if len(absent) == 1 else 'are'} missing"
    numbers = [int(found[1]) for name in absent if (found := re.fullmatch(r"rank-(\d{5,9})\.safetensors", name))]
    nodes = sorted({rank // plan.cluster.gpus_per_node for rank in numbers if rank < plan.cluster.size})
    if plan.cluster.nodes == 1 or not nodes:
        return why, ""
    wrote = f"node{'s' if len(nodes) > 1 else ''} {', '.join(map(str, nodes))} of its run"
    return why, f"{wrote} wrote what is missing, and the node after each has a copy: put the files into this folder"


def _tensors(index: CheckpointIndex) -> dict[str, dict[str, int]]:
    """The tensors of every file, with their elements."""
    found: dict[str, dict[str, int]] = {}
    for stored in index.entries:
        kinds = (MASTER, *MOMENTS) if index.roles[stored.role].adam_steps else (MASTER,)
        found.setdefault(stored.file, {}).update({stored.tensor(kind): stored.entry.size for kind in kinds})
    return found


def verify_files(checkpoint: Checkpoint) -> None:
    """Hold every file that is here against its seal; raises CheckpointError for the first that differs."""
    absent = checkpoint.absent
    here = {name: seal for name, seal in checkpoint.index.files.items() if name not in absent}
    if fault := altered(checkpoint.folder, here):
        raise _refused(checkpoint.folder, fault)


def find_usable(place: Path, plan: ExecutionPlan, *, whole: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that a place means for a plan: itself, or the newest usable one of a folder of checkpoints or of a
    run's output; why newer ones were refused. whole: as for `open_checkpoint`. Raises CheckpointError where there are
    some and none can be used."""
    if names_checkpoint(place):
        return usable(place, plan, whole=whole), []
    found, refusals = newest_usable(folder_of(place), plan, whole=whole)
    if found is None and refusals:
        raise CheckpointError("\n".join(refusals), "start anew without --resume, in another output=FOLDER")
    return found, refusals


def find_whole(place: Path) -> Checkpoint:
    """The checkpoint that a place means: itself, or the newest whole one of a folder of checkpoints or of a run's
    output. Raises CheckpointError where there is none."""
    if names_checkpoint(place):
        return open_checkpoint(place)
    steps = steps_in(folder_of(place))
    found, _ = _newest(folder_of(place), open_checkpoint)
    if found is None and steps:
        return open_checkpoint(steps[0])  # says what is wrong with the newest
    if found is None:
        hint = "a folder global_step_N, or the output of a run that wrote checkpoints"
        raise CheckpointError(f"no checkpoint in `{place}`", hint)
    return found


def names_checkpoint(place: Path) -> bool:
    """Whether a place is one checkpoint, and not a folder of them or the output of a run."""
    return os.path.isfile(place / INDEX) or place.name.startswith(_PREFIX)


def folder_of(place: Path) -> Path:
    """The folder of checkpoints that a place means: that in which it lies, itself, or the one of a run's output."""
    if names_checkpoint(place):
        return place.parent
    return place if steps_in(place) else place / CHECKPOINTS


def newest_usable(folder: Path, plan: ExecutionPlan, *, whole: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a folder that a plan can take up, and why each newer one was refused."""
    return _newest(folder, lambda path: usable(path, plan, whole=whole))


def _newest(folder: Path, take: Callable[[Path], Checkpoint]) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a folder that `take` does not refuse, and why it refused each newer one."""
    refusals: list[str] = []
    for path in steps_in(folder):
        try:
            return take(path), refusals
        except CheckpointError as error:
            refusals.append(error.message)
    return None, refusals


def usable(folder: Path, plan: ExecutionPlan, *, whole: bool = True) -> Checkpoint:
    """A checkpoint that a plan can take up, of which all that is here is as it was written; raises CheckpointError."""
    checkpoint = open_checkpoint(folder, whole=whole)
    if problems := takeover_problems(checkpoint, plan):
        raise _refused(folder, problems[0])
    verify_files(checkpoint)
    return checkpoint


def takeover_problems(checkpoint: Checkpoint, plan: ExecutionPlan) -> list[str]:
    """Why a plan cannot take a checkpoint up: meshes, strategies and precision are free, what is trained and in which
    batches is not, since the order of the data and the samples drawn follow from it."""
    theirs, ours = checkpoint.plan.workload, plan.workload
    found = []
    for what in ("batch_size", "group_size", "minibatches", "prompt_tokens", "response_tokens"):
        if getattr(theirs, what) != getattr(ours, what):
            found.append(f"{what} is {getattr(theirs, what)} there and {getattr(ours, what)} in the plan")
    if theirs.graph.name != ours.graph.name:
        found.insert(0, f"it was written by {theirs.graph.name}, the plan runs {ours.graph.name}")
    elif (trained := set(checkpoint.index.roles) & set(theirs.graph.trainers)) != set(ours.graph.trainers):
        found.insert(0, f"it trains {_listed(trained)}, the plan {_listed(ours.graph.trainers)}")
    else:
        for role in checkpoint.index.roles:
            there, here = (replace(workload.models[role], name="") for workload in (theirs, ours))
            if there != here and there.base == here.base:
                words = (spec.lora.words if spec.lora else "no adapters" for spec in (there, here))
                found.insert(0, "`{}` has {} there and {} in the plan".format(role, *words))
            elif there != here:
                found.insert(0, f"`{role}` is another model there ({theirs.models[role].name})")
    return found


def read_index(folder: Path) -> CheckpointIndex:
    """The index of a checkpoint, whatever files stand beside it. Raises CheckpointError."""
    hint = f"a folder {_PREFIX}N that a run has written"
    if not os.path.isfile(folder / INDEX):
        raise _refused(folder, f"`{INDEX}` is missing")
    try:
        text = read_text(folder / INDEX, CheckpointError, "checkpoint", hint, MOST_INDEX_BYTES)
        index = CheckpointIndex.model_validate(parse_json(text))
        if index.digest != digest_of(index):
            raise _refused(folder, f"`{INDEX}` was altered: its digest is that of another content")
        for stored in index.entries:
            _ = stored.entry
    except BadText as error:
        raise _refused(folder, f"`{INDEX}` is {error.problem.message}") from None
    except ValidationError as error:
        raise _refused(folder, f"`{INDEX}`: {error.errors()[0]['msg']}") from None
    except AssertionError as error:
        raise _refused(folder, f"`{INDEX}`: {error}") from None
    return index


def _refused(folder: Path, why: str, hint: str = "") -> CheckpointError:
    return CheckpointError(
        f"checkpoint `{folder}` cannot be used: {why}", hint or "another checkpoint, or a copy that is whole"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "nothing"
