"""Attempts of a run over the machines that are there."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, time

from plans.checkpoint_files import step_folder
from plans.codec import dump_plan
from plans.plan import ExecutionPlan
from plans.runfile import RunFile, patience_s
from runtime.checkpoints.resume import Start
from runtime.launching.keeping import kept_files
from runtime.launching.ranks import follow
from runtime.launching.replan import replanned
from runtime.machines.keeper import Keeper, lying
from runtime.machines.loading import spread_inputs, spread_weights
from runtime.machines.machines import POLL_S, MachineLost, Machines
from runtime.machines.mirror import apply
from runtime.machines.resume import choose_among, copy_again, give, have_exported
from runtime.machines.wire import Message
from runtime.processes.failures import places
from runtime.processes.network import free_port
from runtime.reports.endings import RunFailed
from runtime.reports.metrics import Metrics

ASK_S = 600.0
"""How long a machine may take to start its ranks, which import torch first, or to end them."""
FETCH_S = 24 * 3600.0
"""How long the files of a checkpoint may take to travel: a machine that is lost meanwhile is noticed before."""


class Crew:
    """Runs attempts on machines: node i of a plan is the i-th machine there. scratch: where ranks leave word. joined:
    the ranks that another launcher has started on each machine, which then are the ones to run."""

    def __init__(
        self, machines: Machines, run: RunFile, scratch: Path, joined: Mapping[int, Sequence[int]] | None = None
    ) -> None:
        self._machines, self._run, self._scratch, self._joined = machines, run, scratch, joined
        self._attempts = 0
        self._devices: dict[int, int] = {}  # of each machine, once something has failed
        self._per_node = 0

    def devices_left(self, plan: ExecutionPlan) -> int:
        """Devices that a plan can still use, of as many machines with equally many as have most together. Where the run
        does not go on without a machine, it waits for one that is started again."""
        nodes, end = plan.cluster.nodes, monotonic() + patience_s(plan, self._run)
        if self._run.on_loss == "stop" and len(self._machines.there) < nodes:
            print(f"waiting for a machine to come back, for timeout_s = {end - monotonic():.0f} s", file=sys.stderr)
            while len(self._machines.there) < nodes and monotonic() < end:
                self._machines.pump(POLL_S)
        found = self._machines.ask_all("devices", ASK_S, plan=dump_plan(plan))
        self._devices = {node: int(answer["devices"]) for node, answer in found.items()}
        machines, self._per_node = equal_part(self._devices, plan.cluster.gpus_per_node)
        return min(machines * self._per_node, plan.cluster.size)

    def replanned(self, plan: ExecutionPlan, run: RunFile, devices: int) -> ExecutionPlan:
        """A plan for the devices that are left."""
        return replanned(plan, run, devices, self._per_node)

    def begin(self, start: Start) -> None:
        """Make way for a run on the other machines: where it starts anew, earlier checkpoints go aside."""
        if self._run.checkpoint.every and not start.own:
            firsts = set(self.storages().values()) - {0}
            self._machines.ask("set_aside", {first: {} for first in firsts}, ASK_S)

    def choose(self, plan: ExecutionPlan, run: RunFile) -> Start:
        """The start that the run file asks for."""
        storages = self.storages() if run.resume_from else {}
        return choose_among(plan, run, self._machines, _per_storage(storages, self._ranks(plan)), FETCH_S)

    def exported(self, role: str) -> Path:
        """Where this machine has, then, what an export of a role reads of the run's last checkpoint."""
        if len(set(self.storages().values())) > 1:
            return have_exported(self._machines, self._run, role, FETCH_S)
        return step_folder(self._run.checkpoint_folder, self._run.iterations)

    def forget(self, _: RunFile, after: int) -> None:
        """Remove the checkpoints after so many iterations, on every machine."""
        self._machines.ask_all("forget", ASK_S, after=after)

    def storages(self) -> dict[int, int]:
        """For every machine the first one that sees the same folder of checkpoints."""
        token = secrets.token_hex(8)
        names = {node: f".probe-{token}-{node}" for node in self._machines.there}
        try:
            self._machines.ask("probe", {node: {"name": name} for node, name in names.items()}, ASK_S)
            seen = self._machines.ask_all("sees", ASK_S, names=list(names.values()))
        finally:
            self._machines.ask("unprobe", {node: {"name": name} for node, name in names.items()}, ASK_S)
        return {node: min(n for n, name in names.items() if name in seen[node]["seen"]) for node in seen}

    def attempt(self, plan: ExecutionPlan, start: Start) -> Sequence[Metrics]:
        """Metrics of one attempt. Raises RunFailed with the cause of its end; no rank is left then."""
        machines, run = self._machines, self._run
        ranks = self._ranks(plan)
        nodes = list(ranks)
        needed = plan.cluster.nodes if self._joined is None else len(self._joined)
        if len(nodes) < needed:
            gone = "; ".join(f"node {node} is lost ({why})" for node, why in machines.lost.items())
            raise RunFailed(f"the plan needs {needed} machines, {len(nodes)} are there: {gone}")
        spread_weights(machines, run, plan, ranks, FETCH_S, resumed=start.checkpoint is not None)
        spread_inputs(machines, run, [node for node in ranks if ranks[node]], FETCH_S)
        storages = self.storages() if run.checkpoint.every else {}
        machines.check(nodes)
        keeps = _per_storage(storages, ranks)
        lies = lying(keeps)
        copy_again(machines, run, start, storages, FETCH_S)
        aside = give(machines, plan, run, start, keeps, FETCH_S)
        keeper = Keeper(machines, keeps, Path(run.output), patience_s(plan, run))
        here = (ranks.get(0, ()), lies.get(0, ()))
        with kept_files(plan, start.of(run), start, self._scratch, keeper, *here) as monitor:
            ready = {"plan": dump_plan(plan), "resume_from": start.of(run).resume_from}
            each = {
                node: ready | {"ranks": list(ranks.get(node, ())), "keeps": lies.get(node)} for node in storages if node
            }
            machines.ask("prepare", each, ASK_S)
            crew = _FarRanks(machines, ranks, self._scratch)
            try:
                self._start(plan, start, ranks, keeps, aside=aside)

                def check() -> None:
                    monitor.check()
                    crew.check(nodes)
                    keeper.poll()

                follow(crew, self._scratch, check, Path(run.output))
            finally:
                crew.close()
                with suppress(RunFailed):  # one that does not end its ranks is lost, or will be
                    machines.ask_all("end", ASK_S)
        return monitor.lines

    def _ranks(self, plan: ExecutionPlan) -> Mapping[int, Sequence[int]]:
        """The machines that have the ranks of a plan, as far as there are any."""
        if self._joined is not None:
            return {node: ranks for node, ranks in self._joined.items() if node in self._machines.there}
        per_node = plan.cluster.gpus_per_node
        fit = [node for node in sorted(self._machines.there) if self._devices.get(node, per_node) >= per_node]
        nodes = fit[: plan.cluster.nodes]
        return {node: range(place * per_node, (place + 1) * per_node) for place, node in enumerate(nodes)}

    def _start(
        self,
        plan: ExecutionPlan,
        start: Start,
        ranks: Mapping[int, Sequence[int]],
        keeps: Mapping[int, Sequence[int]],
        *,
        aside: bool,
    ) -> None:
        machines = self._machines
        self._attempts += 1
        own = start.checkpoint is not None and start.checkpoint.parent == self._run.checkpoint_folder.resolve()
        words = {
            "plan": dump_plan(plan), "meeting": [machines.host, free_port(machines.host), self._attempts],
            "begins": {"checkpoint": str(start.checkpoint or ""), "own": own, "aside": aside,
                       "skip": start.of(self._run).skip_batches, "export": exports_itself(self._run)},
        }  # fmt: skip
        each = {
            node: {**words, "ranks": list(ranks.get(node, ())), "keeps": list(keeps.get(node, ()))}
            for node in machines.there
        }
        machines.ask("start", each, ASK_S)


def equal_part(devices: Mapping[int, int], per_node: int) -> tuple[int, int]:
    """How many machines, and how many devices of each, make the most of what machines have: all `per_node` of a node of
    the plan, or a power of two. Machine 0 is one of them."""
    sizes = [per_node, *(1 << power for power in range(per_node.bit_length()) if 1 << power < per_node)]
    counts = {size: sum(count >= size for count in devices.values()) for size in sizes}
    fit = [(machines * size, size, machines) for size, machines in counts.items() if devices.get(0, 0) >= size]
    _, size, machines = max(fit, default=(0, 0, 0))
    return machines, size


def _per_storage(storages: Mapping[int, int], ranks: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """The ranks whose machines see the folder of checkpoints of each machine that acts for one."""
    return {
        first: [rank for node in ranks if storages.get(node) == first for rank in ranks[node]]
        for first in sorted(set(storages.values()))
    }


class _FarRanks:
    """Ranks on several machines, whose words go to a folder of this one."""

    def __init__(self, machines: Machines, ranks: Mapping[int, Sequence[int]], scratch: Path) -> None:
        self.numbers = [rank for numbers in ranks.values() for rank in numbers]
        self._of = ranks
        self.codes: dict[int, int | None] = {}
        self._machines, self._scratch = machines, scratch
        machines.handlers |= {"said": self._said, "ended": self._ended}

    def close(self) -> None:
        """Listen no more."""
        for kind in ("said", "ended"):
            del self._machines.handlers[kind]

    def check(self, nodes: Sequence[int]) -> None:
        """Raise MachineLost, with where its ranks were, for one of some machines that is."""
        try:
            self._machines.check(nodes)
        except MachineLost as error:
            lost = [rank for node in nodes if node not in self._machines.there for rank in self._of[node]]
            raise MachineLost("\n".join([error.message, *places(self._scratch, time(), lost)])) from None

    def wait(self, timeout_s: float) -> None:
        """Wait for news of the machines until a rank ends, or for so long."""
        end, before = monotonic() + timeout_s, len(self.codes)
        while len(self.codes) == before and (left := end - monotonic()) > 0:
            self._machines.pump(min(left, 0.1))

    def _said(self, _: int, message: Message) -> None:
        apply(self._scratch, message)

    def _ended(self, _: int, message: Message) -> None:
        self.codes |= {int(rank): None if code is None else int(code) for rank, code in message["codes"]}


def exports_itself(run: RunFile) -> bool:
    """Whether the ranks of a run write its weights at the end, since no checkpoint has them."""
    return run.export and not run.checkpoint.every
