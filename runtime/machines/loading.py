"""Weights, data and tokenizer for every machine of a run: who has them, and one copy over the network for each that has
not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from plans.codec import dump_plan
from plans.errors import RealplanError
from plans.plan import ExecutionPlan
from plans.runfile import RunFile
from runtime.machines.machines import Machines
from runtime.machines.named import input_paths, weight_folders
from runtime.machines.wire import Message


def spread_weights(
    machines: Machines,
    run: RunFile,
    plan: ExecutionPlan,
    ranks: Mapping[int, Sequence[int] | None],
    patience_s: float,
    *,
    resumed: bool = False,
) -> None:
    """Have machines hold what their ranks read of the weights (None: all of them) where they do not have the folder.
    resumed: the run goes on from a checkpoint. Raises RealplanError for a folder that no machine has or that differs
    between machines, and RunFailed."""
    names = weight_folders(run)
    if not names:
        return
    found = {node: answer["folders"] for node, answer in machines.ask_all("weights", patience_s).items()}
    readers = [node for node in ranks if ranks[node] is None or ranks[node]]
    each: dict[int, Message] = {}
    for node, folders in _wants(machines, found, [f"weights `{name}`" for name in names], readers).items():
        numbers = ranks[node]
        said = None if numbers is None else list(numbers)
        each[node] = {"plan": dump_plan(plan), "ranks": said, "folders": folders, "resumed": resumed}
    machines.ask("fetch_weights", each, patience_s)


def spread_inputs(machines: Machines, run: RunFile, nodes: Sequence[int], patience_s: float) -> None:
    """Have some machines hold data and tokenizer where they do not have them. Raises RealplanError for those that no
    machine has or that differ between machines, and RunFailed."""
    names = input_paths(run)
    if not names or len(machines.there) < 2:
        return
    found = {node: answer["inputs"] for node, answer in machines.ask_all("inputs", patience_s).items()}
    words = [f"tokenizer `{name}`" if name == run.tokenizer else f"data `{name}`" for name in names]
    each = {node: {"inputs": inputs} for node, inputs in _wants(machines, found, words, nodes).items()}
    machines.ask("fetch_inputs", each, patience_s)


def _wants(
    machines: Machines, found: Mapping[int, Mapping[str, Message]], words: Sequence[str], nodes: Iterable[int]
) -> dict[int, dict[str, Message]]:
    """What some machines lack, by number, with who has it. found: by machine and number what is there."""
    wants: dict[int, dict[str, Message]] = {}
    for number, name in enumerate(words):
        found_at = holders(machines, found, str(number), name)
        for node in nodes:
            if node not in found_at:
                turned = [found_at[(node + i) % len(found_at)] for i in range(len(found_at))]  # the load is shared
                sources = [machines.there[holder].source for holder in turned]
                wants.setdefault(node, {})[str(number)] = {**found[turned[0]][str(number)], "sources": sources}
    return wants


def holders(machines: Machines, found: Mapping[int, Mapping[str, Message]], number: str, name: str) -> list[int]:
    """The machines that have something, all the same; `name` says what."""
    having = sorted(node for node in found if number in found[node])
    if not having:
        there = ", ".join(machines.words(node) for node in sorted(found))
        raise RealplanError(f"{name}: no machine has it; there are {there}", "a path that one of them has")
    for node in having[1:]:
        if found[node][number]["mark"] != found[having[0]][number]["mark"]:
            raise RealplanError(
                f"{name}: {machines.words(node)} has other files than {machines.words(having[0])}",
                "the same files on both; a machine without them reads those of another one",
            )
    return having
