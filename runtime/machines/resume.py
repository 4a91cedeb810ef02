"""Where a run over several machines begins: the newest checkpoint that they hold together."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plans.checkpoint_files import (
    CheckpointError,
    names_checkpoint,
    open_checkpoint,
    step_folder,
    takeover_problems,
)
from plans.codec import dump_plan
from plans.plan import ExecutionPlan
from plans.runfile import RunFile
from runtime.checkpoints.held import resumed_folder
from runtime.checkpoints.resume import Start, choose_start, start_from
from runtime.machines.machines import Machines
from runtime.machines.storage import other_folder, taken_in
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


def choose_among(
    plan: ExecutionPlan, run: RunFile, machines: Machines, ranks: Mapping[int, Sequence[int]], patience_s: float
) -> Start:
    """The start that `resume_from` asks for, whatever machines its checkpoint lies on. ranks: for the machine that acts
    for each storage, those whose state it holds then. Raises CheckpointError as `choose_start` does."""
    place, other = Path(run.resume_from), other_folder(run)
    if not run.resume_from or len(ranks) < 2:
        return choose_start(plan, run)
    named, refusals = names_checkpoint(place), list[str]()
    for spread in spread_checkpoints(machines.ask_all("inventory", patience_s, other=other is not None)):
        if named and step_folder(place.parent, spread.iteration) != place:
            continue
        try:
            take_needed(machines, spread, plan, {0: [], **ranks}, patience_s, other=other is not None)
            taken = resumed_folder(taken_in(run, other=other is not None), spread.iteration)
            if problems := takeover_problems(found := open_checkpoint(taken), plan):
                raise CheckpointError(f"checkpoint `global_step_{spread.iteration}` cannot be used: {problems[0]}")
            return start_from(found, step_folder(other or run.checkpoint_folder, spread.iteration), run)
        except (CheckpointError, RunFailed) as error:
            refusals.append(error.message)
            print(f"{error.message}; the one before is used", file=sys.stderr)
    if refusals:
        raise CheckpointError("\n".join(refusals), "start anew without --resume, in another output=FOLDER")
    if named or other is not None:
        what = f"checkpoint `{place}`" if named else f"a checkpoint in `{place}`"
        hint = (
            "--resume takes the newest" if other is None else "resume_from=FOLDER, a checkpoint or the output of a run"
        )
        raise CheckpointError(f"the machines do not hold {what} together", hint)
    print(f"no checkpoint in {run.checkpoint_folder} yet: starting at the first iteration", file=sys.stderr)
    return Start(own=True)


def have_exported(machines: Machines, run: RunFile, role: str, patience_s: float) -> Path:
    """Where this machine has, then, what an export of a role reads of a run's last checkpoint, which lies on several
    machines: its masters. Raises RunFailed where they do not hold it together: an older one is not what was trained."""
    for spread in spread_checkpoints(machines.ask_all("inventory", patience_s)):
        if spread.iteration == run.iterations:
            wants = {"iteration": spread.iteration, "role": role, "files": _files(machines, spread)}
            machines.ask("take_masters", {0: wants}, patience_s)
            return resumed_folder(run.checkpoint_folder, spread.iteration)
    raise RunFailed(
        f"the machines do not hold the checkpoint of iteration {run.iterations} together, which is to be exported",
        "--resume with more iterations; `realrun export CHECKPOINT FOLDER` exports an older one",
    )


def take_needed(
    machines: Machines,
    spread: Spread,
    plan: ExecutionPlan,
    ranks: Mapping[int, Sequence[int]],
    patience_s: float,
    *,
    other: bool,
) -> None:
    """Have machines hold what some ranks read of a checkpoint, of the run's own or of the `other` run's. Raises
    RunFailed."""
    words = {"iteration": spread.iteration, "plan": dump_plan(plan), "files": _files(machines, spread), "other": other}
    each: dict[int, Message] = {node: words | {"ranks": list(numbers)} for node, numbers in ranks.items()}
    machines.ask("take_needed", each, patience_s)


def copy_again(machines: Machines, run: RunFile, start: Start, storages: Mapping[int, int], patience_s: float) -> None:
    """Have every file of the run's own checkpoint that it goes on from on two storages: a machine that is lost has left
    some on one alone, for as long as no new checkpoint is whole. storages: for every machine the first one that sees
    the same folder. What cannot be copied stays where it is: the run can go on."""
    firsts = sorted(set(storages.values()))
    if len(firsts) < 2 or start.checkpoint is None or start.checkpoint.parent != run.checkpoint_folder.resolve():
        return
    inventories = machines.ask_all("inventory", patience_s)
    for spread in (each for each in spread_checkpoints(inventories) if each.iteration == start.iteration):
        wants = lone_files(spread, storages)
        files = _files(machines, spread)
        each = {
            node: {"iteration": spread.iteration, "files": [file for file in files if file["name"] in names]}
            for node, names in wants.items()
        }
        if each:
            what = f"checkpoint {spread.iteration}: what lay on one machine alone"
            try:
                machines.ask("fetch_step", each, patience_s)
                print(f"{what} is copied to a second one", file=sys.stderr)
            except RunFailed as error:
                print(f"{what} stays there: {error.message}", file=sys.stderr)
        return


def lone_files(spread: Spread, storages: Mapping[int, int]) -> dict[int, set[str]]:
    """For a storage what it lacks of the files that one storage alone has: the next one gets them, with those that
    every storage has of a checkpoint, such as its index."""
    firsts, wants = sorted(set(storages.values())), dict[int, set[str]]()
    common = {name for name in spread.files if not name.endswith(".safetensors")}
    for name in spread.files.keys() - common:
        held = {storages[node] for node in spread.holders[name] if node in storages}
        if len(held) == 1:
            after = firsts[(firsts.index(held.pop()) + 1) % len(firsts)]
            wants.setdefault(after, set(common)).add(name)
    return wants


def _files(machines: Machines, spread: Spread) -> list[Message]:
    there = machines.there
    return [
        {
            "name": name,
            "seal": seal,
            "sources": [there[node].source for node in spread.holders[name] if node in there],
        }
        for name, seal in spread.files.items()
    ]


def give(
    machines: Machines,
    plan: ExecutionPlan,
    run: RunFile,
    start: Start,
    ranks: Mapping[int, Sequence[int]],
    patience_s: float,
) -> bool:
    """Have the machine that acts for each storage hold what its ranks read of the checkpoint of a start; whether they
    find it in `resumed_folder`. Raises RunFailed for one that cannot."""  # fmt: skip
    if start.checkpoint is None or len(ranks) < 2:
        return False
    other = start.checkpoint.parent != run.checkpoint_folder.resolve()
    for spread in spread_checkpoints(machines.ask_all("inventory", patience_s, other=other)):
        if spread.iteration == start.iteration:
            writers = {node: own for node, own in ranks.items() if own}
            take_needed(machines, spread, plan, writers, patience_s, other=other)
            return True
    raise RunFailed(f"checkpoint `{start.checkpoint}` is on no machines together any more")
