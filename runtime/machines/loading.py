"""Weights for every machine of a run: who has them, and one copy over the network for each that has not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from plans.codec import dump_plan
from plans.errors import RealplanError
from plans.plan import ExecutionPlan
from plans.runfile import RunFile
from runtime.machines.machines import Machines
from runtime.machines.weights import weight_folders
from runtime.machines.wire import Message


def spread_weights(
    machines: Machines,
    run: RunFile,
    plan: ExecutionPlan,
    ranks: Mapping[int, Sequence[int] | None],
    patience_s: float,
) -> None:
    """Have machines hold what their ranks read of the weights (None: all of them) where they do not have the folder.
    Raises RealplanError for a folder that no machine has or that differs between machines, and RunFailed."""
    names = weight_folders(run)
    if not names:
        return
    found = {node: answer["folders"] for node, answer in machines.ask_all("weights", patience_s).items()}
    wants: dict[int, dict[str, Message]] = {}
    for number, folder in enumerate(names):
        found_at = holders(machines, found, str(number), folder)
        for node in ranks:
            if node not in found_at and (ranks[node] is None or ranks[node]):
                turned = [found_at[(node + i) % len(found_at)] for i in range(len(found_at))]  # the load is shared
                sources = [machines.there[holder].source for holder in turned]
                wants.setdefault(node, {})[str(number)] = {**found[turned[0]][str(number)], "sources": sources}
    each = {}
    for node, folders in wants.items():
        numbers = ranks[node]
        said = None if numbers is None else list(numbers)
        each[node] = {"plan": dump_plan(plan), "ranks": said, "folders": folders}
    machines.ask("fetch_weights", each, patience_s)


def holders(machines: Machines, found: Mapping[int, Mapping[str, Message]], number: str, folder: str) -> list[int]:
    """The machines that have a folder, all the same one."""
    having = sorted(node for node in found if number in found[node])
    if not having:
        there = ", ".join(machines.words(node) for node in sorted(found))
        raise RealplanError(f"weights `{folder}`: no machine has such a folder; there are {there}", "weights=FOLDER")
    for node in having[1:]:
        if found[node][number]["mark"] != found[having[0]][number]["mark"]:
            raise RealplanError(
                f"weights `{folder}` of {machines.words(node)} are not those of {machines.words(having[0])}",
                "the same files on both; a machine without the folder reads them from another one",
            )
    return having
