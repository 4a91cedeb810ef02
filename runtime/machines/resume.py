"""Where a run over several machines begins: the newest checkpoint that they hold together."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plans.checkpoint_files import CheckpointError, read_index, step_folder
from plans.plan import ExecutionPlan
from plans.runfile import RunFile
from runtime.checkpoints.resume import Start, choose_start
from runtime.machines.machines import Machines
from runtime.machines.wire import Message
from runtime.reports.endings import RunFailed


@dataclass(frozen=True)
class Spread:
    """A checkpoint whose files lie on several machines. digest: that of its index; files: the seal of each, the
    index last; holders: who has it."""

    iteration: int
    digest: str
    files: Mapping[str, Message]
    holders: Mapping[str, Sequence[int]]


def spread_checkpoints(inventories: Mapping[int, Message]) -> Iterator[Spread]:
    """The checkpoints of which the machines together hold every file, the newest first. inventories: what
    `Storage.inventory` says of each machine."""
    found: dict[tuple[int, str], dict[int, Message]] = {}
    for node, inventory in inventories.items():
        for step in inventory["steps"]:
            found.setdefault((int(step["iteration"]), str(step["digest"])), {})[node] = step
    for iteration, digest in sorted(found, reverse=True):
        steps = found[iteration, digest]
        files: Message = next(iter(steps.values()))["files"]
        holders = {name: [node for node, step in steps.items() if name in step["here"]] for name in files}
        if all(holders.values()):
            yield Spread(iteration, digest, files, holders)


def choose_among(plan: ExecutionPlan, run: RunFile, machines: Machines, patience_s: float) -> Start:
    """The start that `resume_from` asks for, whatever machines its checkpoint lies on; this machine has all of it then.
    Raises CheckpointError as `choose_start` does."""
    if not run.resume_from or Path(run.resume_from).resolve() != run.checkpoint_folder.resolve():
        return choose_start(plan, run)
    refusals = list[str]()
    for spread in spread_checkpoints(machines.ask_all("inventory", patience_s)):
        place = step_folder(run.checkpoint_folder, spread.iteration)
        try:
            take(machines, spread, [0], patience_s)
            return choose_start(plan, run.model_copy(update={"resume_from": str(place)}))
        except (CheckpointError, RunFailed) as error:
            refusals.append(error.message)
            print(f"{error.message}; the one before is used", file=sys.stderr)
    if refusals:
        raise CheckpointError("\n".join(refusals), "start anew without --resume, in another output=FOLDER")
    print(f"no checkpoint in {run.checkpoint_folder} yet: starting at the first iteration", file=sys.stderr)
    return Start(own=True)


def take(machines: Machines, spread: Spread, nodes: Sequence[int], patience_s: float) -> None:
    """Have some machines fetch what they lack of a checkpoint. Raises RunFailed."""
    there = machines.there
    files = [
        {
            "name": name,
            "seal": seal,
            "sources": [there[node].source for node in spread.holders[name] if node in there],
        }
        for name, seal in spread.files.items()
    ]
    machines.ask("fetch_step", {n: {"iteration": spread.iteration, "files": files} for n in nodes}, patience_s)


def give(machines: Machines, run: RunFile, start: Start, nodes: Sequence[int], patience_s: float) -> None:
    """Have some machines hold the checkpoint of a start as this one does. Raises RunFailed for one that cannot."""
    if start.checkpoint is None or not nodes:
        return
    digest = read_index(start.checkpoint).digest
    if start.checkpoint.parent != run.checkpoint_folder.resolve():  # another run's: it must be there
        asked = {node: {"folder": str(start.checkpoint)} for node in nodes}
        for node, answer in machines.ask("digest", asked, patience_s).items():
            if answer["digest"] != digest:
                raise RunFailed(
                    f"{machines.words(node)} has not checkpoint `{start.checkpoint}`",
                    "copy it there, to the same folder",
                )
        return
    found = spread_checkpoints(machines.ask_all("inventory", patience_s))
    take(machines, next(spread for spread in found if spread.digest == digest), nodes, patience_s)
