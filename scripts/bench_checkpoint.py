"""What checkpoints cost: their files against `dd conv=fsync`, and a run that writes one after every iteration against
one that writes none.

    bench_checkpoint.py [--mib 1540] [--folder FOLDER] [--repeats 3] [--demo | --plan plan.json] [key=value ...]

1,540 MiB are the state of SmolLM2-135M: master and two moments of 134.5 million parameters. All figures are ratios of
was measured in the same minutes. With --plan the plan runs twice with checkpoints and twice without, overrides being
those of realrun; --demo does it with that of scripts/demo.py, three iterations each, five minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import demo
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from plans.seals import CHUNK_BYTES, Seal, altered
from plans.timeline import Timeline, load_timeline
from runtime.checkpoints.write import write_tensors

MIB = 2**20
TENSORS, TURNS = 64, 8


def main() -> int:
    """Measure, and print a table; fails where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1540)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--demo", action="store_true", help="run the plan that the demo finds for this machine")
    parser.add_argument("--plan", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    table, missed = Table("what", "measured", "bar"), 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = [(f"{name} against dd", ratio, 0.7, True) for name, ratio in files(Path(folder), options).items()]
        plan = demo_plan(Path(folder)) if options.demo else options.plan
        if plan:
            found = runs(plan, Path(folder), ["iterations=3"] * options.demo + options.overrides)
            rows += [(*row, False) for row in found]
    for what, value, bar, least in rows:
        table.add_row(what, f"{value:.3f}", f"{'>=' if least else '<='} {bar}")
        missed += value < bar if least else value > bar
    Console().print(table)
    return int(missed > 0)


def files(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Speed of writing and of reading a rank's file, checksums and all, as parts of that of dd: medians of the ratios
    of pairs of small turns, every second pair the other way round, since disks have bursts and a machine other users.

    Both read the file that we wrote, and from the disk; dd has nothing to keep, ours puts the tensors to their places.
    """
    mib = options.mib // TURNS
    tensors = {f"actor/{number}": torch.rand(mib * MIB // 4 // TENSORS) for number in range(TENSORS)}
    there = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    ours, plain = folder / "ours.safetensors", folder / "plain"
    dd = ["dd", "bs=8M", "status=none", "iflag=fullblock"]
    write_dd = [*dd, "if=/dev/zero", f"of={plain}", f"count={mib // 8}", "conv=fsync"]
    read_dd = [*dd, f"if={ours}", "of=/dev/null"]
    spent: dict[str, list[tuple[float, float]]] = {"written": [], "read": []}
    for number in range(TURNS * options.repeats):
        for path in (ours, plain):
            path.unlink(missing_ok=True)
        seals: list[Seal] = []
        write = lambda to=seals: to.append(write_tensors(ours, tensors))  # noqa: E731
        spent["written"].append(pair(number, lambda: run(write_dd), write))
        cold = partial(forget, ours)
        spent["read"].append(pair(number, lambda: run(read_dd), lambda of=seals: read(ours, of[0], there), cold))
    ratios = {}
    for name, pairs in spent.items():
        base, own = (mib / statistics.median(seconds) for seconds in zip(*pairs, strict=True))
        print(f"{name}: {own:,.0f} MiB/s, dd {base:,.0f}")
        ratios[name] = statistics.median(base / own for base, own in pairs)
    return ratios


def pair(
    number: int, base: Callable[[], object], own: Callable[[], object], before: Callable[[], object] = int
) -> tuple[float, float]:
    """Seconds of two things, one after the other, in pairs of odd numbers the second one first."""
    found = {}
    for act in (own, base) if number % 2 else (base, own):
        before()
        found[act] = seconds(act)
    return found[base], found[own]


def run(command: list[str]) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True)


def seconds(act: Callable[[], object]) -> float:
    """How long something takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def forget(path: Path) -> None:
    """Have a file on the disk alone, not in memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path, seal: Seal, there: dict[str, torch.Tensor]) -> None:
    """What a resumed run does with a file: hold it against its seal, then copy its tensors to their places."""
    fault = altered(path.parent, {path.name: seal})
    assert not fault, fault
    with safe_open(path, framework="pt") as file:
        for name, tensor in there.items():
            tensor.copy_(file.get_slice(name)[0 : tensor.numel()])


def demo_plan(folder: Path) -> Path:
    """The plan of the demo for this machine, beside its run file."""
    run_file, plan = demo.prepare(demo.SENTIMENT, folder, seed=1), folder / "plan.json"
    demo.call("realplan", "search", "--run", str(run_file), "--cluster", "local-cpu", "--seconds", "5", "-o", str(plan))
    return plan


@dataclass(frozen=True)
class Figures:
    """Of a run: seconds from the end of each iteration to that of the next, those for which ranks stand still between
    two iterations, and those of the cores for the whole run."""

    periods_s: tuple[float, ...]
    gap_s: float
    cpu_s: float


def runs(plan: Path, folder: Path, overrides: list[str]) -> list[tuple[str, float, float]]:
    """Rows of figures with their bars, of runs with a checkpoint after every iteration and of runs with none: none,
    with, with, none, so that a machine that grows slower or faster does so for both; medians of like iterations."""
    adopt()
    found: dict[int, list[Figures]] = {0: [], 1: []}
    for number, every in enumerate((0, 1, 1, 0)):
        output = folder / f"run-{number}"
        words = [f"output={output}", f"checkpoint.every={every}", "checkpoint.keep=1", "export=false", "report=false"]
        command = [str(Path(sys.executable).with_name("realrun")), str(plan), *words, *overrides]
        before = cpu_seconds()
        run(command)
        timeline = load_timeline(output / "timeline.json")
        figures = Figures(periods(timeline), between(timeline), cpu_seconds() - before)
        found[every].append(figures)
        print(f"{'checkpoints' if every else 'no checkpoints'}: {figures}", flush=True)
        shutil.rmtree(output)
    without, with_ = found[0], found[1]
    period = statistics.median(second for figures in without for second in figures.periods_s)
    gaps = [statistics.mean(figures.gap_s for figures in each) for each in (without, with_)]
    pairs = [
        both for one, two in zip(without, with_, strict=True) for both in zip(one.periods_s, two.periods_s, strict=True)
    ]
    cpu = [sum(figures.cpu_s for figures in each) for each in (without, with_)]
    print(f"CPU time of the runs: {cpu[1]:.0f} s, without checkpoints {cpu[0]:.0f}")
    return [
        ("iteration against none", statistics.median(slow / fast for fast, slow in pairs), 1.10),
        ("blocked, of an iteration", (gaps[1] - gaps[0]) / period, 0.05),
    ]


def adopt() -> None:
    """Have processes whose parents end before them become children of this one, so that their CPU time is known."""
    pr_set_child_subreaper = 36
    assert ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0) == 0


def cpu_seconds() -> float:
    """Of all processes that this one has started, or they; waits for those that are left."""
    with suppress(ChildProcessError):
        while True:
            os.wait()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def periods(timeline: Timeline) -> tuple[float, ...]:
    """Seconds from the end of every iteration to that of the next, on the last rank."""
    ends = {
        number: max(span.end_s for span in timeline.iteration(number))
        for number in {s.iteration for s in timeline.spans}
    }
    return tuple(ends[number + 1] - end for number, end in sorted(ends.items()) if number + 1 in ends)


def between(timeline: Timeline) -> float:
    """Median seconds from a rank's last span of an iteration to its first one of the next."""
    first: dict[tuple[int, int], float] = {}
    last: dict[tuple[int, int], float] = {}
    for span in timeline.spans:
        for rank in span.ranks:
            key = (rank, span.iteration)
            first[key] = min(first.get(key, span.start_s), span.start_s)
            last[key] = max(last.get(key, span.end_s), span.end_s)
    return statistics.median(first[r, i + 1] - last[r, i] for r, i in last if (r, i + 1) in first)


if __name__ == "__main__":
    assert CHUNK_BYTES == 8 * MIB, "dd writes in chunks as large as those of a checkpoint"
    raise SystemExit(main())
