"""Generation one iteration ahead on a mesh of its own, against the same work on-policy.

    python scripts/bench_async.py [--iterations 12] [--output runs/async]

GRPO of the one-million-parameter fixture on two ranks of the CPU, three plans: `ahead` generates on rank 0 while rank 1
scores and trains the batch before (`--async 1`), `apart` has the same meshes on-policy, where one rank waits for the
other, `together` has every call on both ranks. It prints each plan's period, how long generation and training of one
ran at the same time in the measured timeline, and how much shorter the period of `ahead` is. Every rank has one thread;
ratios are honest only on two cores that nothing else uses.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from plans.algorithms import algorithm_graph
from plans.checks import check_plan
from plans.cluster import parse_mesh
from plans.codec import save_plan
from plans.library import load_cluster, load_model
from plans.plan import ExecutionPlan, PlannedCall
from plans.strategy import ParallelStrategy, parse_degrees
from plans.timeline import Span, load_timeline
from plans.workload import Workload

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
MOST_S = 1800.0
WHOLE, FIRST, SECOND = ("node 0", "d2 t1 p1"), ("node 0 gpu 0", "d1 t1 p1"), ("node 0 gpu 1", "d1 t1 p1")
APART = {"actor_generate": FIRST, "ref_infer": SECOND, "actor_train": SECOND}
PLANS: dict[str, tuple[int, Mapping[str, tuple[str, str]]]] = {
    "ahead": (1, APART), "apart": (0, APART), "together": (0, dict.fromkeys(APART, WHOLE)),
}  # fmt: skip
"""Name -> iterations that generation is ahead, and the places of the calls."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of a plan's period, and for how many of them generation and training ran at the same time; how far the
    policy had moved since the generation, by the KL before the first step, and the last rewards."""

    period_s: float
    overlap_s: float
    stale_kl: float
    reward: float


def main() -> int:
    """Run the plans, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "async")
    options = parser.parse_args()
    found = {name: measure(name, options.iterations, options.output / name) for name in PLANS}
    table = Table("plan", "period (s)", "at the same time (s)", "KL of the age", "reward, last three")
    for name, m in found.items():
        table.add_row(name, f"{m.period_s:.3f}", f"{m.overlap_s:.3f}", f"{m.stale_kl:.2g}", f"{m.reward:+.3f}")
    console = Console()
    console.print(table)
    for name in ("apart", "together"):
        console.print(f"ahead against {name}: {found[name].period_s / found['ahead'].period_s:.2f} x")
    return 0 if found["ahead"].overlap_s > 0 else 1


def plan_of(staleness: int, places: Mapping[str, tuple[str, str]]) -> ExecutionPlan:
    """A plan of two ranks; what runs ahead of the rest has its trainings a period later."""
    cluster = load_cluster("local-cpu", gpus=2, gpus_per_node=2)
    graph = algorithm_graph("grpo", reward_seconds_per_sample=1e-4, staleness=staleness)
    models = dict.fromkeys(graph.roles, load_model(str(FIXTURES / "tiny-llama")))
    workload = Workload(graph=graph, models=models, batch_size=16, group_size=4, prompt_tokens=8, response_tokens=48,
                        minibatches=2, dtype="fp32")  # fmt: skip
    calls = [
        PlannedCall(
            call=name, mesh=parse_mesh(mesh, cluster), strategy=ParallelStrategy(**parse_degrees(degrees)),
            lag=staleness if name != "actor_generate" else 0,
        )
        for name, (mesh, degrees) in places.items()
    ]  # fmt: skip
    plan = ExecutionPlan(workload=workload, cluster=cluster, calls=tuple(calls))
    problems = check_plan(plan)
    assert not problems, problems[0].message
    return plan


def measure(name: str, iterations: int, output: Path) -> Measured:
    """Run a plan; its page is in the output."""
    output.mkdir(parents=True, exist_ok=True)
    save_plan(plan_of(*PLANS[name]), output / "asked.json")
    run = {
        "weights": str(FIXTURES / "tiny-llama"), "data": {"source": str(FIXTURES / "prompts.jsonl")}, "seed": 1,
        "reward": f"{Path(__file__).with_name('improve_variants.py')}:vowels", "sampling": {"stop_at_eos": False},
        "actor": {"lr": 1e-3, "warmup_steps": 2}, "ppo": {"kl_coefficient": 0.01}, "iterations": iterations,
        "output": str(output), "checkpoint": {"every": 0}, "export": False, "timeout_s": MOST_S,
    }  # fmt: skip
    (output / "asked.yaml").write_text(yaml.safe_dump(run))
    code = "from runtime.cli import main; main()"
    command = [sys.executable, "-c", code, str(output / "asked.json"), "--run", str(output / "asked.yaml")]
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="a") as scratch:  # names of sockets are short
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": scratch}
        subprocess.run(command, cwd=ROOT, check=True, timeout=MOST_S, env=environment)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    timeline = load_timeline(output / "timeline.json")
    settled = [span for span in timeline.spans if 2 <= span.iteration < iterations]
    overlap_s = overlap(_of(settled, "actor_generate"), _of(settled, "actor_train")) / max(1, iterations - 2)
    stale = [abs(line.get("actor/stale_ppo_kl", 0.0)) for line in lines[2:]]
    reward = sum(line["critic/score/mean"] for line in lines[-3:]) / 3
    return Measured(timeline.period_s, overlap_s, sum(stale) / len(stale), reward)


def _of(spans: Iterable[Span], name: str) -> list[Span]:
    return [span for span in spans if span.name == name]


def overlap(one: Iterable[Span], two: Iterable[Span]) -> float:
    """Seconds for which a span of each list runs; the spans of a list follow each other."""
    others = list(two)
    return sum(max(0.0, min(a.end_s, b.end_s) - max(a.start_s, b.start_s)) for a in one for b in others)


if __name__ == "__main__":
    raise SystemExit(main())
