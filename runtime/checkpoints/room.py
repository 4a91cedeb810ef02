"""Room for what a run writes, asked for before its ranks start: on the disks, and in host memory. Light: no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from plans.algorithms import REFERENCE
from plans.checkpoint import parameters_of, written
from plans.checkpoint_files import MASTER_BYTES, STATE_BYTES, steps_in
from plans.cluster import GIB
from plans.errors import RealplanError
from plans.host_memory import host_memory
from plans.layout import Layout, model_units
from plans.plan import ExecutionPlan
from plans.program import compile_program
from plans.run_output import BEST
from plans.runfile import RunFile


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that something takes in a folder; `hint`: how it would take less, or none there."""

    what: str
    folder: Path
    bytes: int
    hint: str


def checkpoint_bytes(plan: ExecutionPlan, run: RunFile, ranks: Sequence[int] | None = None) -> int:
    """Bytes of one checkpoint of a run, or of what some ranks write of it: the state of trained roles, and the weights
    of a reference that follows. Where the optimizer is sharded, a rank's part is that of equal shards."""
    trainers, models = plan.workload.graph.trainers, plan.workload.models
    sizes = dict.fromkeys(trainers, STATE_BYTES) | ({REFERENCE: MASTER_BYTES} if run.reference.every else {})
    if ranks is None:
        return sum(each * p.size for role, each in sizes.items() for p in parameters_of(models[role]).values())
    layouts = {role: plan.layout(call) for role, call in trainers.items()}
    if run.reference.every:
        layouts[REFERENCE] = _first_copy(plan, REFERENCE)
    return sum(
        each * entry.size
        for role, each in sizes.items()
        for rank in set(ranks) & layouts[role].places.keys()
        for entry in written(layouts[role], rank)
    )


def _first_copy(plan: ExecutionPlan, role: str) -> Layout:
    """The copy of a frozen role that a checkpoint is written from."""
    return next(copy.layout for copy in compile_program(plan).copies if copy.role == role)


def export_bytes(plan: ExecutionPlan, role: str) -> int:
    """Bytes of a role's weights as a Hugging Face folder, with those of its adapters beside it."""
    spec = plan.workload.models[role]
    return plan.workload.element_bytes * sum(p.size for unit in model_units(spec) for p in unit.parameters)


def check_disks(plan: ExecutionPlan, run: RunFile, keeps: Sequence[int] | None = None, *, exports: bool) -> None:
    """Raise RealplanError where a disk of this machine is too small for what comes to lie on it. keeps: the ranks whose
    parts of checkpoints do (None: all). exports: whether the weights that a run leaves lie here."""
    needs = list(_exports(plan, run)) if exports else []
    if run.checkpoint.every:
        folder = run.checkpoint_folder
        # One more than is kept stands there while the oldest waits to be removed.
        count = max(run.checkpoint.keep + 1 - len(steps_in(folder)), 1)
        hint = "checkpoint.folder=FOLDER on another disk, a smaller checkpoint.keep, or checkpoint.every=0 for none"
        needs.append(Need("checkpoints need", folder, count * checkpoint_bytes(plan, run, keeps), hint))
        if exports and run.export and keeps is not None:
            needs.append(_gathered(plan, folder, keeps))
    check_needs(needs)


def _exports(plan: ExecutionPlan, run: RunFile) -> Iterable[Need]:
    role, output = next(iter(plan.workload.graph.trainers)), Path(run.output)
    each = export_bytes(plan, role)
    if run.export:
        yield Need(
            f"the exported weights of `{role}` need", output, each, "output=FOLDER on another disk, or export=false"
        )
    if run.evaluation.every and run.evaluation.keep_best:
        # A better one is written beside the one that it replaces.
        count = 1 if os.path.isdir(output / BEST) else 2
        hint = "output=FOLDER on another disk, or evaluation.keep_best=false"
        yield Need("the best weights, and those that they replace, need", output, count * each, hint)


def _gathered(plan: ExecutionPlan, folder: Path, keeps: Sequence[int]) -> Need:
    """The masters of other machines, which come here for the export at the end."""
    role = next(iter(plan.workload.graph.trainers))
    layout = plan.layout(plan.workload.graph.trainers[role])
    others = layout.places.keys() - set(keeps)
    size = MASTER_BYTES * sum(entry.size for rank in others for entry in written(layout, rank))
    what = f"the masters of `{role}` on other machines, which the export reads, need"
    return Need(what, folder, size, "checkpoint.folder=FOLDER on another disk, or export=false")


def check_needs(needs: Sequence[Need]) -> None:
    """Raise RealplanError for a disk that has not the room for all that is to lie on it."""
    disks: dict[int, list[Need]] = {}
    for need in needs:
        disks.setdefault(_there(need.folder).stat().st_dev, []).append(need)
    for on in disks.values():
        free = shutil.disk_usage(_there(on[0].folder)).free
        if sum(need.bytes for need in on) > free:
            words = "; ".join(f"{need.what} {_size(need.bytes)} in `{need.folder}`" for need in on if need.bytes)
            hints = dict.fromkeys(need.hint for need in on if need.bytes)
            raise RealplanError(f"{words}, where {_size(free)} are free", "; ".join(hints))


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def _there(folder: Path) -> Path:
    """A folder, or where it will be made."""
    folder = folder.resolve()
    return next(place for place in (folder, *folder.parents) if os.path.isdir(place))


def check_memory(plan: ExecutionPlan, run: RunFile, ranks: Sequence[int] | None = None) -> None:
    """Raise RealplanError where host memory has no room for the copies that checkpoints are written from. ranks: those
    that run on this machine (None: all)."""
    found = host_memory() if run.checkpoint.every else None
    copies = checkpoint_bytes(plan, run, ranks) if found else 0
    if found and found.available < copies:
        raise RealplanError(
            f"checkpoints need {copies / GIB:.1f} GiB of host memory, "
            f"and {found.available / GIB:.1f} GiB are available",
            "checkpoint.every=0 for no checkpoints",
        )
