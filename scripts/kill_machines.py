"""Kill machines of runs at random moments and see that nothing is lost: every run ends, with the metrics of an
undisturbed one.

    python scripts/kill_machines.py [--kills 24] [--first 0] [--output runs/kills]

A run over two machines: a `realrun --node-rank N` each on loopback, with folders of their own, which see only what the
other sends. The victim is a rank, a realrun, or a whole machine: all its processes at once. A machine that stands still
(SIGSTOP) is as one that is cut off. A supervisor starts a realrun again that ends before its run, as slurm or systemd
would; where node 0 has ended, all with `--resume`.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

import yaml
from gpu_check.plays import Places, fixture_plan, fixture_run
from gpu_check.right import small_experts
from kill_runs import ITERATIONS, MOST_S, Bench, Metrics, Process, differences, learnt
from rich.console import Console
from rich.table import Table

from plans.codec import save_plan
from runtime.reports.records import read_status

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from warm import Started, start_warm

MACHINES, TIMEOUT_S, RESTARTS = 2, 20, 3
HOST = "127.0.0.1"
STILL_S = 25.0
"""How long a realrun or a machine stands still: longer than it is waited for."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
VICTIMS = ("machine 1", "realrun 1", "rank 1", "machine 0", "realrun 0", "rank 0")
WHOLE = "nodes 0-1"
APART = {
    "actor_generate": (WHOLE, "d2 t1 p1", {}),
    "reward_infer": ("node 0", "d1 t1 p1", {}),
    "ref_infer": ("node 0", "d1 t1 p1", {}),
    "critic_infer": ("node 1", "d1 t1 p1", {}),
    "actor_train": ("node 0", "d1 t1 p1", {}),
    "critic_train": ("node 1", "d1 t1 p1", {}),
}
EXPERTS = {"*": (WHOLE, "d2 t1 p1 e2", {}), "actor_generate": (WHOLE, "d2 t1 p1", {})}
JOBS: Mapping[str, tuple[str, Places]] = {
    "ppo, machines apart": ("ppo", APART),
    "grpo, d2": ("grpo", {"*": (WHOLE, "d2 t1 p1", {})}),
    "dpo, pp2": ("dpo", {"*": (WHOLE, "d1 t1 p2", {})}),
    "grpo, experts, ep2": ("grpo", EXPERTS),
}


class Kill:
    """The kill of a number: a signal to a victim when so many iterations are done, at a moment. The first twelve have
    every job, signal and victim among them."""

    def __init__(self, number: int) -> None:
        rng = random.Random(f"machine {number}")
        self.job = list(JOBS)[number % len(JOBS)]
        self.victim = VICTIMS[(number + number // 6) % len(VICTIMS)]
        self.signal = SIGNALS[(number + number // 3) % len(SIGNALS)]
        self.after = rng.randrange(ITERATIONS - 1)
        self.checkpoint = (number + number // len(JOBS)) % 4 == 3
        self.delay_s = rng.uniform(0.0, 0.5)

    def __str__(self) -> str:
        when = "while a checkpoint is written" if self.checkpoint else f"and {self.delay_s:.2f} s"
        return f"{self.signal.name} to {self.victim} after {self.after} iterations {when}"


class MachineBench(Bench):
    """A folder of runs over two machines."""

    def __init__(self, output: Path) -> None:
        super().__init__(output, start_warm)
        self._known: dict[str, Metrics] = {}

    def of_nobody(self, name: str) -> Metrics:
        """Metrics of a job that nobody kills."""
        if name not in self._known:
            folder = self._prepared(name, f"undisturbed {name}")
            made = [self._begin(folder, node) for node in range(MACHINES)]
            said = [process.communicate(MOST_S)[1] for process in made]
            assert not any(process.returncode for process in made), said
            self._known[name] = learnt(folder / "out-0")
            left = self._left(folder)
            assert not left, left
        return self._known[name]

    def struck(self, number: int) -> str:
        """What is wrong after a kill; empty when nothing is."""
        kill = Kill(number)
        wanted = self.of_nobody(kill.job)
        folder = self._prepared(kill.job, f"machines {number}")
        made = [self._begin(folder, node) for node in range(MACHINES)]
        every = list(made)
        try:
            self._hit(kill, made, folder)
            fault = self._supervise(folder, made, every)
        finally:
            for process in every:
                _signal(process.pid, signal.SIGCONT)
                process.kill()
        words = "".join(process.communicate(MOST_S)[1] for process in every)
        if "Traceback" in words:
            fault = fault or f"a traceback: {words[max(0, words.index('Traceback') - 200) :][:3000]}"
        orphaned = kill.victim.startswith("machine") and kill.signal == signal.SIGKILL
        return fault or differences(learnt(folder / "out-0"), wanted) or self._left(folder, orphaned=orphaned)

    def _prepared(self, name: str, place: str) -> Path:
        """A folder with a plan, and a run file for each machine."""
        algorithm, places = JOBS[name]
        experts = "experts" in name
        folder = self._output / place.replace(" ", "-").replace(",", "")
        folder.mkdir(parents=True)
        plan = fixture_plan(algorithm, MACHINES, places, spec=small_experts() if experts else None, nodes=MACHINES)
        save_plan(plan, folder / "plan.json")
        run = fixture_run(folder / "data", algorithm, random=experts)
        keys = {
            "iterations": ITERATIONS, "restarts": RESTARTS, "timeout_s": TIMEOUT_S, "checkpoint": {"every": 1},
            "report": False, "on_loss": "stop",
        }  # fmt: skip
        for node in range(MACHINES):
            data = run.model_dump(mode="json") | keys | {"output": str(folder / f"out-{node}")}
            (folder / f"run-{node}.yaml").write_text(yaml.safe_dump(data))
        with closing(socket.create_server((HOST, 0))) as probe:
            (folder / "port").write_text(str(probe.getsockname()[1]))
        return folder

    def _begin(self, folder: Path, node: int, *more: str) -> Started:
        port = (folder / "port").read_text()
        code = "from runtime.cli import main; main()"
        words = ["--node-rank", str(node), "--master-addr", HOST, "--master-port", port, *more]
        files = [str(folder / "plan.json"), "--run", str(folder / f"run-{node}.yaml")]
        process = self._start([sys.executable, "-c", code, *files, *words], folder)
        assert isinstance(process, Started)
        return process

    def _supervise(self, folder: Path, made: list[Started], every: list[Started]) -> str:
        """Start again what ends before its run, until node 0 has ended well; what is wrong."""
        end, rounds = time.monotonic() + MOST_S, 0
        while (code := made[0].poll()) is None or code or made[1].poll() is None:
            if time.monotonic() > end:
                return "it did not end"
            if code is None and made[1].poll() is not None:
                made[1] = self._begin(folder, 1)
                every.append(made[1])
            elif code and made[1].poll() is not None:
                if rounds == 2:
                    return f"--resume does not go on: {made[0].communicate(timeout=MOST_S)[1][-500:]}"
                rounds += 1
                made[:] = [self._begin(folder, node, "--resume") for node in range(MACHINES)]
                every += made
            time.sleep(0.5)
        return ""

    @staticmethod
    def _hit(kill: Kill, made: Sequence[Process], folder: Path) -> None:
        """Send the signal at its moment. What was made to stand still goes on when it is missed."""
        output, node = folder / "out-0", int(kill.victim[-1])
        end = time.monotonic() + MOST_S

        def runs() -> bool:
            return all(process.poll() is None for process in made) and time.monotonic() < end

        while len(_lines(output)) < kill.after and runs():
            time.sleep(0.02)
        if kill.checkpoint:
            place = folder / f"out-{node}" / "checkpoints"
            while not list(place.glob(".global_step_*.partial")) and runs():
                time.sleep(0.002)
        else:
            time.sleep(kill.delay_s)
        while (status := read_status(output / ".ranks", node)) is None and runs():
            time.sleep(0.02)
        if status is None or not runs():
            return  # the run was faster
        kind = kill.victim.split()[0]
        victims = {"rank": [status.pid], "realrun": [made[node].pid], "machine": _session(made[node].pid)}[kind]
        for pid in victims:
            _signal(pid, kill.signal)
        if kill.signal == signal.SIGSTOP and kind != "rank":
            time.sleep(STILL_S)
            for pid in victims:
                _signal(pid, signal.SIGCONT)


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _session(leader: int) -> list[int]:
    """The processes of a session, its leader first."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError):
            if os.getsid(int(path.name)) == leader:
                found.append(int(path.name))
    return sorted(found, key=lambda pid: pid != leader)


def _lines(output: Path) -> list[str]:
    try:
        return (output / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []


def main() -> int:
    """Kill machines; 1 when something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/kills"))
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} is there already; give another --output")
    options.output.mkdir(parents=True)
    bench, faults = MachineBench(options.output.resolve()), 0
    table = Table("kill", "job", "what happened", "result", "s")
    for number in range(options.first, options.first + options.kills):
        begun = time.monotonic()
        kill, fault = Kill(number), bench.struck(number)
        faults += bool(fault)
        table.add_row(str(number), kill.job, str(kill), fault or "nothing lost", f"{time.monotonic() - begun:.0f}")
        print(f"{number}: {kill.job}: {kill}: {fault or 'nothing lost'}", file=sys.stderr, flush=True)
    Console().print(table)
    print(f"{options.kills} kills, {faults} losses")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
