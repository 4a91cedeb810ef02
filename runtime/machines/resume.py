"""Where a run over several machines begins: the newest checkpoint that they hold together."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plans.checkpoint_files import CheckpointError, open_checkpoint, read_index, step_folder, takeover_problems
from plans.codec import dump_plan
from plans.plan import ExecutionPlan
from plans.runfile import RunFile
from runtime.checkpoints.held import resumed_folder
from runtime.checkpoints.resume import Start, choose_start, start_from
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


def choose_among(
    plan: ExecutionPlan, run: RunFile, machines: Machines, ranks: Mapping[int, Sequence[int]], patience_s: float
) -> Start:
    """The start that `resume_from` asks for, whatever machines its checkpoint lies on. ranks: for the machine that acts
    for each storage, those whose state it holds then. Raises CheckpointError as `choose_start` does."""
    if not _spreads(run, ranks):
        return choose_start(plan, run)
    refusals = list[str]()
    for spread in spread_checkpoints(machines.ask_all("inventory", patience_s)):
        try:
            take_needed(machines, spread, plan, {0: [], **ranks}, patience_s)
            found = open_checkpoint(resumed_folder(run.checkpoint_folder, spread.iteration))
            if problems := takeover_problems(found, plan):
                raise CheckpointError(f"checkpoint `global_step_{spread.iteration}` cannot be used: {problems[0]}")
            return start_from(found, step_folder(run.checkpoint_folder, spread.iteration), run)
        except (CheckpointError, RunFailed) as error:
            refusals.append(error.message)
            print(f"{error.message}; the one before is used", file=sys.stderr)
    if refusals:
        raise CheckpointError("\n".join(refusals), "start anew without --resume, in another output=FOLDER")
    print(f"no checkpoint in {run.checkpoint_folder} yet: starting at the first iteration", file=sys.stderr)
    return Start(own=True)


def choose_whole(plan: ExecutionPlan, run: RunFile, machines: Machines, patience_s: float) -> Start:
    """The newest checkpoint of a run's own, all of which this machine has then."""
    for spread in spread_checkpoints(machines.ask_all("inventory", patience_s)):
        take(machines, spread, [0], patience_s)
        break
    return choose_start(plan, run.model_copy(update={"resume_from": str(run.checkpoint_folder)}))


def _spreads(run: RunFile, storages: Sequence[int] | Mapping[int, Sequence[int]]) -> bool:
    """Whether the checkpoint that is asked for is the run's own and may lie on several machines."""
    own = bool(run.resume_from) and Path(run.resume_from).resolve() == run.checkpoint_folder.resolve()
    return own and len(storages) > 1


def take_needed(
    machines: Machines, spread: Spread, plan: ExecutionPlan, ranks: Mapping[int, Sequence[int]], patience_s: float
) -> None:
    """Have machines hold what some ranks read of a checkpoint. Raises RunFailed."""
    files = _files(machines, spread)
    each = {
        node: {"iteration": spread.iteration, "plan": dump_plan(plan), "ranks": list(numbers), "files": files}
        for node, numbers in ranks.items()
    }
    machines.ask("take_needed", each, patience_s)


def take(machines: Machines, spread: Spread, nodes: Sequence[int], patience_s: float) -> None:
    """Have some machines fetch what they lack of a checkpoint. Raises RunFailed."""
    files = _files(machines, spread)
    machines.ask("fetch_step", {n: {"iteration": spread.iteration, "files": files} for n in nodes}, patience_s)


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
    if start.checkpoint.parent != run.checkpoint_folder.resolve():  # another run's: it must be there
        digest, nodes = read_index(start.checkpoint).digest, [node for node in ranks if node and ranks[node]]
        asked = {node: {"folder": str(start.checkpoint)} for node in nodes}
        for node, answer in machines.ask("digest", asked, patience_s).items():
            if answer["digest"] != digest:
                raise RunFailed(
                    f"{machines.words(node)} has not checkpoint `{start.checkpoint}`",
                    "copy it there, to the same folder",
                )
        return False
    for spread in spread_checkpoints(machines.ask_all("inventory", patience_s)):
        if spread.iteration == start.iteration:
            take_needed(machines, spread, plan, {node: own for node, own in ranks.items() if own}, patience_s)
            return True
    raise RunFailed(f"checkpoint `{start.checkpoint}` is on no machines together any more")
