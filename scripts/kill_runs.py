"""Kill runs at random moments and see that nothing is lost: every run ends, with the metrics of an undisturbed one.

    python scripts/kill_runs.py [--kills 60] [--first 0] [--output runs/kills]

PPO, GRPO and DPO, dense and with experts, of a small model on two ranks of the CPU with a checkpoint after every
iteration. The victim is a rank or the launcher, the signal SIGKILL, SIGTERM or SIGSTOP, the moment any, also while a
checkpoint is written. A rank that dies or stands still is restarted by the run itself; a run that was told to stop, or
whose launcher was killed, by `--resume`. Afterwards no process and no temporary file may be left. `kill_machines.py`
does the same to runs over two machines.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from gpu_check.plays import Places, fixture_plan, fixture_run
from gpu_check.right import small_experts
from rich.console import Console
from rich.table import Table

from plans.codec import save_plan
from plans.model import ModelSpec
from runtime.reports.records import read_status

ITERATIONS, RESTARTS, TIMEOUT_S = 5, 3, 10
MOST_S = 900.0
"""For one start of a run, on a busy machine."""
STOPPED_S = TIMEOUT_S + 2.0
"""For how long a launcher stands still: longer than ranks wait for each other."""
LEAVE_S = 60.0
"""For the last processes to end, on a busy machine."""
MARK = "REALPLAN_KILLED_RUN"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
VICTIMS = ("rank 0", "rank 1", "launcher")
MOMENTS = ("any", "any", "any", "checkpoint")
Metrics = list[dict[str, float]]


@dataclass(frozen=True, slots=True)
class Job:
    """A run to kill: an algorithm of the fixture's model, or of one with experts, and its places."""

    algorithm: str
    places: Places
    experts: bool = False


APART = {
    "actor_generate": ("node 0", "d2 t1 p1", {}),
    "reward_infer": ("node 0 gpu 0", "d1 t1 p1", {}),
    "ref_infer": ("node 0 gpu 0", "d1 t1 p1", {}),
    "critic_infer": ("node 0 gpu 1", "d1 t1 p1", {}),
    "actor_train": ("node 0 gpu 0", "d1 t1 p1", {}),
    "critic_train": ("node 0 gpu 1", "d1 t1 p1", {}),
}
EXPERTS = {"*": ("node 0", "d2 t1 p1 e2", {}), "actor_generate": ("node 0", "d2 t1 p1", {})}
JOBS: Mapping[str, Job] = {
    "ppo, disjoint": Job("ppo", APART),
    "grpo, tp2": Job("grpo", {"*": ("node 0", "d1 t2 p1", {})}),
    "dpo, pp2": Job("dpo", {"*": ("node 0", "d1 t1 p2", {})}),
    "grpo, experts, ep2": Job("grpo", EXPERTS, experts=True),
}


@dataclass(frozen=True, slots=True)
class Kill:
    """What happens to a run: a signal to a victim when so many iterations are done, at a moment."""

    job: str
    victim: str
    signal: signal.Signals
    after: int
    moment: str
    delay_s: float

    def __str__(self) -> str:
        when = "while a checkpoint is written" if self.moment == "checkpoint" else f"and {self.delay_s:.2f} s"
        return f"{self.signal.name} to {self.victim} after {self.after} iterations {when}"


def kill_of(number: int) -> Kill:
    """The kill of that number; the first ones have every job, signal and victim among them, and each job is hit at
    every moment."""
    rng = random.Random(f"kill {number}")
    return Kill(
        job=list(JOBS)[number % len(JOBS)],
        victim=VICTIMS[(number // 3 + number) % 3],
        signal=SIGNALS[number % 3],
        after=rng.randrange(ITERATIONS - 1),
        moment=MOMENTS[(number + number // len(JOBS)) % len(MOMENTS)],
        delay_s=rng.uniform(0.0, 0.5),
    )


class Process(Protocol):
    """What is asked of a command under way."""

    pid: int

    @property
    def returncode(self) -> int | None:
        """Its exit code, once it is known."""

    def poll(self) -> int | None:
        """Its exit code, when it has ended."""

    def kill(self) -> None:
        """End it at once."""

    def communicate(self, *, timeout: float) -> tuple[str, str]:
        """What it has said on stdout and stderr, when it has ended."""


Start = Callable[[Sequence[str], Mapping[str, str]], Process]


def start_fresh(command: Sequence[str], environment: Mapping[str, str]) -> Process:
    """Start a command, which leads a session of its own."""
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


class Bench:
    """A folder of runs. `undisturbed` runs are made once per job. start: starts a command, with an environment."""

    def __init__(self, output: Path, start: Start = start_fresh) -> None:
        self._output, self._starts = output, start
        self._wanted: dict[str, Metrics] = {}
        self._temporary: dict[Path, Path] = {}
        self._sessions: dict[Path, list[int]] = {}

    def undisturbed(self, name: str) -> Metrics:
        """Metrics of a job that nobody kills."""
        if name not in self._wanted:
            command, folder = self._command(name, f"undisturbed {name}")
            done = self._run(command, folder)
            assert done.returncode == 0, done.stderr
            self._wanted[name] = learnt(folder / "out")
            left = self._left(folder)
            assert not left, left
        return self._wanted[name]

    def killed(self, number: int) -> str:
        """What is wrong after a kill; empty when nothing is."""
        kill = kill_of(number)
        wanted = self.undisturbed(kill.job)
        command, folder = self._command(kill.job, f"kill {number}")
        process = self._start(command, folder)
        try:
            done = self._strike(kill, process, folder / "out")
            _, said = process.communicate(timeout=MOST_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return "it did not end"
        finally:
            process.kill()
        by_itself = kill.victim != "launcher" and kill.signal != signal.SIGTERM
        if process.returncode and by_itself:
            return f"it did not go on by itself: {said[-500:]}"
        if "Traceback" in said:
            return f"a traceback: {said[max(0, said.index('Traceback') - 200) :][:3000]}"
        if process.returncode:
            again = self._run([*command, "--resume"], folder)
            if again.returncode:
                return f"--resume: {again.stderr[-500:]}"
            said += again.stderr
        ended = kill.signal == signal.SIGKILL or by_itself  # a launcher that stands still goes on
        return (
            too_far_back(said, done, ended=ended) or differences(learnt(folder / "out"), wanted) or self._left(folder)
        )

    def _command(self, name: str, place: str) -> tuple[list[str], Path]:
        job, folder = JOBS[name], self._output / place.replace(" ", "-").replace(",", "")
        folder.mkdir(parents=True)
        spec: ModelSpec | None = small_experts() if job.experts else None
        plan = fixture_plan(job.algorithm, 2, job.places, spec=spec)
        run = fixture_run(folder / "out", job.algorithm, random=job.experts)
        keys: dict[str, Any] = {
            "iterations": ITERATIONS, "restarts": RESTARTS, "timeout_s": TIMEOUT_S, "checkpoint": {"every": 1},
            "report": False,
        }  # fmt: skip
        data = run.model_dump(mode="json") | keys
        save_plan(plan, folder / "plan.json")
        (folder / "run.yaml").write_text(yaml.safe_dump(data))
        code = "from runtime.cli import main; main()"
        return [sys.executable, "-c", code, str(folder / "plan.json"), "--run", str(folder / "run.yaml")], folder

    def _start(self, command: Sequence[str], folder: Path) -> Process:
        # A folder of its own for temporary files, with a short name: a socket's address has 107 characters.
        place = self._temporary.setdefault(folder, Path(tempfile.mkdtemp(prefix="kill-")))
        process = self._starts(command, {**os.environ, MARK: str(folder), "TMPDIR": str(place)})
        self._sessions.setdefault(folder, []).append(process.pid)
        return process

    def _run(self, command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
        process = self._start(command, folder)
        try:
            _, said = process.communicate(timeout=MOST_S)
        finally:
            process.kill()
        return subprocess.CompletedProcess(command, process.returncode, "", said)

    @staticmethod
    def _strike(kill: Kill, process: Process, output: Path) -> int:
        """Send the signal at its moment; how many iterations were done by then. A launcher that was made to stand still
        goes on a little later."""
        end = time.monotonic() + MOST_S
        while len(_lines(output)) < kill.after and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        if kill.moment == "checkpoint":
            while not list((output / "checkpoints").glob(".global_step_*.partial")) and process.poll() is None:
                time.sleep(0.002)
        else:
            time.sleep(kill.delay_s)
        victim = process.pid
        if kill.victim != "launcher":
            while (status := read_status(output / ".ranks", int(kill.victim[-1]))) is None and process.poll() is None:
                time.sleep(0.02)
            if status is None or process.poll() is not None:
                return 0  # the run was faster
            victim = status.pid
        done = len(_lines(output))
        try:
            os.kill(victim, kill.signal)
        except ProcessLookupError:
            return 0
        if kill.victim == "launcher" and kill.signal == signal.SIGSTOP:
            time.sleep(STOPPED_S)
            os.kill(victim, signal.SIGCONT)
        return done

    def _left(self, folder: Path, *, orphaned: bool = False) -> str:
        """Processes and files that should not be there any more. orphaned: nobody was left to remove temporary ones."""
        end = time.monotonic() + LEAVE_S
        while (marked := _marked(str(folder), self._sessions[folder])) and time.monotonic() < end:
            time.sleep(0.1)
        # torch keeps a cache of compiled code, which all runs of a user share.
        place = self._temporary.pop(folder)
        files = [path for path in place.iterdir() if not path.name.startswith("torchinductor_") and not orphaned]
        files += folder.rglob(".*")
        found = [*(f"process {pid} ({_command_of(pid)})" for pid in marked), *(f"`{path}`" for path in files)]
        shutil.rmtree(place)
        return f"left behind: {', '.join(found)}" if found else ""


def _marked(folder: str, sessions: Sequence[int]) -> list[int]:
    """Processes that were started with a run's mark in their environment, or in the session of one of its commands."""
    mark, found = f"{MARK}={folder}\0".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            state, _, _, session, *_ = path.with_name("stat").read_text().rpartition(")")[2].split()
            if state != "Z" and (int(session) in sessions or mark in path.read_bytes()):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    except OSError:
        return "gone by now"


def _lines(output: Path) -> list[str]:
    try:
        return (output / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []


def learnt(output: Path) -> Metrics:
    """Metrics of a run without those of time and memory."""
    apart = ("timing_s/", "perf/", "plan/")
    lines = [json.loads(line) for line in _lines(output)]
    return [{key: value for key, value in line.items() if not key.startswith(apart)} for line in lines]


def too_far_back(said: str, done: int, *, ended: bool) -> str:
    """What is wrong where a run went on from before its last checkpoint but one: with one after every iteration that of
    the last may be on its way to the disk, and the one before is there. ended: it has had to go on."""
    begun = [int(step) for step in re.findall(r"going on from \S*global_step_(\d+)", said)]
    if begun and begun[0] < done - 1:
        return f"{done} iterations were done, and it went on from {begun[0]}"
    if ended and not begun and 2 <= done < ITERATIONS:
        return f"{done} iterations were done, and it began anew"
    return ""


def differences(found: Metrics, wanted: Metrics) -> str:
    if len(found) != len(wanted):
        return f"{len(found)} iterations of {len(wanted)}"
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if other := [key for key in theirs if ours.get(key) != theirs[key]]:
            return f"iteration {number}: {other[0]} is {ours.get(other[0])}, not {theirs[other[0]]}"
    return ""


def main() -> int:
    """Kill runs; 1 when something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/kills"))
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} is there already; give another --output")
    options.output.mkdir(parents=True)
    bench, faults = Bench(options.output.resolve()), 0
    table = Table("kill", "job", "what happened", "result")
    for number in range(options.first, options.first + options.kills):
        fault = bench.killed(number)
        faults += bool(fault)
        table.add_row(str(number), kill_of(number).job, str(kill_of(number)), fault or "nothing lost")
        print(f"{number}: {kill_of(number)}: {fault or 'nothing lost'}", file=sys.stderr, flush=True)
    Console().print(table)
    print(f"{options.kills} kills, {faults} losses")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
