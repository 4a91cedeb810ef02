"""Predicted against measured seconds on this CPU: profile, plan, run, compare.

    bench_predictions.py [--output FOLDER] [--iterations 7] [--only NAME ...] [--no-four] [--long-tailed]

Profiles a small Llama on one core, takes plans on 1, 2 and 4 ranks (hand-varied ones and a searched one), predicts
each with the profile's cost table, runs it with `realrun` on random weights, and prints predicted and measured seconds
per call and iteration. Then it holds how many plans there are, how far their predictions span, MAPE and Spearman's
rank correlation against the bars (`BARS`), and fails where one is missed. Plans on 4 ranks are reported, not judged:
the machine may have fewer cores. `report.json` in the output folder holds all figures. What is measured is wall time:
run it on an idle machine. `busy_s` of the report is the processor time per iteration of the rank that worked most; far
below the measured time it tells that ranks waited, for each other or for other processes' cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from cost_models.estimate import cost_plan
from plans.algorithms import algorithm_graph
from plans.checks import check_plan
from plans.cluster import parse_mesh
from plans.codec import load_plan, save_plan
from plans.errors import RealplanError
from plans.library import load_cluster, load_model
from plans.plan import ExecutionPlan, PlannedCall
from plans.strategy import ParallelStrategy, Recompute, parse_degrees
from plans.workload import Workload

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
CALLS = ("actor_generate", "reward_infer", "ref_infer", "critic_infer", "actor_train", "critic_train")
SIZES = {
    "short": {"batch_size": 8, "prompt_tokens": 64, "response_tokens": 16, "minibatches": 1},
    "long": {"batch_size": 8, "prompt_tokens": 64, "response_tokens": 64, "minibatches": 2},
    "wide": {"batch_size": 16, "prompt_tokens": 96, "response_tokens": 32, "minibatches": 2},
}
TAIL = {"short": 12, "long": 20, "wide": 12}
"""Mean response tokens of the sizes with long-tailed lengths."""
BARS = {"plans": (12, True), "span": (3.0, True), "iteration_mape": (0.08, False), "iteration_spearman": (0.97, True)}
"""Figure -> what it must be, and whether that is the least (else the most). span: largest over smallest prediction."""
WARM_UPS = 2
PROCESS_TICKS = os.sysconf("SC_CLK_TCK")
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """A plan: ranks, sizes, and per call (`*`: the others) `mesh | degrees` with settings of the strategy."""

    name: str
    ranks: int
    sizes: str
    calls: Mapping[str, tuple[str, Settings]] = field(default_factory=dict)


def on(where: str, **settings: Any) -> tuple[str, Settings]:
    """`mesh | degrees` and settings."""
    return where, settings


VARIANTS = (
    Variant("one", 1, "short", {"*": on("node 0 | d1 t1 p1")}),
    Variant("one-cut", 1, "long", {"*": on("node 0 | d1 t1 p1", micro_batches=2)}),
    Variant("one-recompute", 1, "wide", {"*": on("node 0 | d1 t1 p1", micro_batches=2, recompute=Recompute.FULL)}),
    Variant("data", 2, "wide", {"*": on("node 0 | d2 t1 p1")}),
    Variant("data-replicated", 2, "short", {"*": on("node 0 | d2 t1 p1", shard_optimizer=False)}),
    Variant("tensor", 2, "short", {"*": on("node 0 | d1 t2 p1")}),
    Variant("tensor-long", 2, "long", {"*": on("node 0 | d1 t2 p1")}),
    Variant("pipeline", 2, "wide", {"*": on("node 0 | d1 t1 p2", micro_batches=4, groups=2)}),
    Variant(
        "data-tensor",
        2,
        "long",
        {"*": on("node 0 | d2 t1 p1"), "actor_train": on("node 0 | d1 t2 p1", micro_batches=2)},
    ),
    Variant(
        "tensor-pipeline",
        2,
        "short",
        {"*": on("node 0 | d1 t1 p2", micro_batches=2), "actor_generate": on("node 0 | d1 t2 p1")},
    ),
    Variant(
        "apart",
        2,
        "wide",
        {
            "*": on("node 0 gpu 0 | d1 t1 p1", micro_batches=2),
            "critic_infer": on("node 0 gpu 1 | d1 t1 p1"),
            "ref_infer": on("node 0 gpu 1 | d1 t1 p1"),
            "critic_train": on("node 0 gpu 1 | d1 t1 p1", micro_batches=2),
        },
    ),
    Variant(
        "apart-data",
        2,
        "long",
        {
            "*": on("node 0 gpu 0 | d1 t1 p1"),
            "actor_generate": on("node 0 | d2 t1 p1"),
            "critic_infer": on("node 0 gpu 1 | d1 t1 p1"),
            "critic_train": on("node 0 gpu 1 | d1 t1 p1"),
        },
    ),
    Variant("searched", 2, "wide"),
    Variant("four-data-tensor", 4, "wide", {"*": on("node 0 | d2 t2 p1")}),
    Variant("four-pipeline", 4, "wide", {"*": on("node 0 | d2 t1 p2", micro_batches=2, groups=2)}),
)


def main() -> int:
    """Run the benchmark."""
    options = _options()
    if options.long_tailed:
        for name, mean in TAIL.items():
            SIZES[name] |= {"mean_response_tokens": mean}
            SIZES[name]["response_tokens"] *= 2
    output: Path = options.output
    model, table = output / "model", output / "table.json"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(MODEL, indent=2))
    _realplan("profile", "--model", model, "--device", "cpu", "--tp", "1,2", "-o", table)
    rows = []
    for variant in _chosen(options.only, options.no_four):
        path = output / variant.name / "plan.json"
        path.parent.mkdir(exist_ok=True)
        plan = _searched(variant, model, table, path) if variant.name == "searched" else _planned(variant, model)
        plan = plan.with_estimate(cost_plan(plan, str(table)).estimate)
        save_plan(plan, path)
        row = _run(variant, plan, path, options.iterations)
        rows.append(row)
        _print_row(row)
    report: dict[str, Any] = {"figures": figures(rows), "cores": os.cpu_count(), "load": os.getloadavg(), "plans": rows}
    (output / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report["figures"], indent=1))
    return int(not _print_bars(report["figures"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/predictions"))
    parser.add_argument("--iterations", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=[], help="names of plans")
    parser.add_argument("--no-four", action="store_true", help="leave out the plans on 4 ranks")
    parser.add_argument("--long-tailed", action="store_true", help="responses of a long tail, twice as long at most")
    return parser.parse_args()


def _chosen(names: Iterable[str], no_four: bool) -> list[Variant]:
    wanted = set(names)
    return [v for v in VARIANTS if (not wanted or v.name in wanted) and not (no_four and v.ranks == 4)]


def _realplan(*words: object) -> None:
    subprocess.run([_script("realplan"), *map(str, words)], check=True)


def _script(name: str) -> str:
    """A console script of the environment of this interpreter."""
    return str(Path(sys.executable).with_name(name))


def _workload(variant: Variant, model: Path) -> Workload:
    graph = algorithm_graph("ppo")
    spec = load_model(str(model))
    models = {role: spec if role in ("actor", "ref") else spec.with_value_head() for role in graph.roles}
    return Workload(graph=graph, models=models, dtype="fp32", **SIZES[variant.sizes])


def _planned(variant: Variant, model: Path) -> ExecutionPlan:
    """The plan of a variant, checked."""
    cluster = load_cluster("local-cpu", gpus=variant.ranks, gpus_per_node=variant.ranks)
    calls = []
    for name in CALLS:
        where, settings = variant.calls.get(name, variant.calls["*"])
        mesh, _, degrees = where.partition("|")
        legal = {k: v for k, v in settings.items() if k in _legal_settings(name)}
        strategy = ParallelStrategy(**parse_degrees(degrees.strip()), **legal)
        calls.append(PlannedCall(call=name, mesh=parse_mesh(mesh.strip(), cluster), strategy=strategy))
    plan = ExecutionPlan(workload=_workload(variant, model), cluster=cluster, calls=tuple(calls))
    problems = check_plan(plan)
    if problems:
        raise RealplanError(f"{variant.name}: {problems[0].message}", problems[0].hint)
    return plan


def _legal_settings(call: str) -> tuple[str, ...]:
    if call.endswith("train"):
        return ("micro_batches", "recompute", "shard_optimizer", "sequence_parallel")
    return ("groups",) if call.endswith("generate") else ("micro_batches",)


def _searched(variant: Variant, model: Path, table: Path, path: Path) -> ExecutionPlan:
    sizes = [word for k, v in SIZES[variant.sizes].items() for word in (f"--{k.replace('_', '-')}", v)]
    words = ("--model", model, "--cluster", "local-cpu", "--gpus", variant.ranks, "--dtype", "fp32", "--seconds", 10)
    _realplan("search", *words, *sizes, "--table", table, "-o", path)
    return replace(load_plan(path), run="")


def _run(variant: Variant, plan: ExecutionPlan, path: Path, iterations: int) -> dict[str, Any]:
    """Run a plan; medians over its iterations after the first two, in which memory is touched for the first time."""
    folder = path.parent / "run"
    words = ("weights=random", f"iterations={iterations}", "export=false", f"output={folder}")
    command = [_script("realrun"), str(path), *words]
    process = subprocess.Popen(command, stderr=(path.parent / "log").open("w"))
    busy = _watch(process, folder, plan.cluster.size, iterations)
    if process.wait():
        raise RealplanError(f"{variant.name} failed:\n{(path.parent / 'log').read_text()[-2000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][WARM_UPS:]
    assert plan.estimate is not None
    measured = {c: statistics.median(line[f"plan/{c}/measured_s"] for line in lines) for c in CALLS}
    period_s = json.loads((folder / "timeline.json").read_text())["period_s"]
    return {
        "plan": variant.name,
        "ranks": variant.ranks,
        "predicted_s": plan.estimate.iteration_s,
        "measured_s": round(period_s, 4),
        "busy_s": busy,
        "calls": {c: {"predicted_s": plan.estimate.calls_s[c], "measured_s": round(measured[c], 4)} for c in CALLS},
    }


def _watch(process: subprocess.Popen[bytes], folder: Path, ranks: int, iterations: int) -> float | None:
    """Processor seconds per iteration of the rank that works most, by the lines that the run writes."""
    pids: dict[int, int] = {}
    seen: dict[int, list[float]] = {}
    while process.poll() is None:
        time.sleep(0.1)
        for rank in range(ranks):
            pids[rank] = _pid(folder, rank) or pids.get(rank, 0)
        metrics = folder / "metrics.jsonl"
        done = metrics.read_text().count("\n") if metrics.exists() else 0
        now = [_cpu_seconds(pids.get(rank, 0)) for rank in range(ranks)]
        if 0 < done <= iterations and done not in seen and all(now):  # a rank that has ended has no time any more
            seen[done] = now
    if len(seen) < 2:
        return None
    (first, before), (last, after) = min(seen.items()), max(seen.items())
    return round(max(b - a for a, b in zip(before, after, strict=True)) / (last - first), 4)


def _pid(folder: Path, rank: int) -> int | None:
    try:
        return int(json.loads((folder / ".ranks" / f"status-{rank}").read_text().strip("\0 \n"))["pid"])
    except (OSError, ValueError, KeyError):
        return None


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / PROCESS_TICKS


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is judged of the plans on one and two ranks; plans alone where there are too few to compare."""
    judged = [row for row in rows if row["ranks"] <= 2]
    calls = [call for row in judged for call in row["calls"].values()]
    found: dict[str, Any] = {"plans": len(judged)}
    if len(judged) > 1:
        pairs = [(row["predicted_s"], row["measured_s"]) for row in judged]
        predicted = [row["predicted_s"] for row in judged]
        found["span"] = round(max(predicted) / min(predicted), 2)
        found["iteration_mape"] = _mape(pairs)
        found["iteration_spearman"] = round(float(spearmanr(*zip(*pairs, strict=True)).statistic), 4)
        found["call_mape"] = _mape([(call["predicted_s"], call["measured_s"]) for call in calls])
    return found


def bars(found: Mapping[str, Any]) -> dict[str, bool]:
    """Figure -> whether its bar is met; one that could not be computed misses it."""

    def met(value: float | None, bar: float, least: bool) -> bool:
        return value is not None and (value >= bar if least else value <= bar)  # NaN fails

    return {name: met(found.get(name), bar, least) for name, (bar, least) in BARS.items()}


def _print_bars(found: Mapping[str, Any]) -> bool:
    """A line for each bar; whether all are met."""
    judged = bars(found)
    for name, met in judged.items():
        bar, least = BARS[name]
        rule = f"{'>=' if least else '<='} {bar:g}"
        print(f"{name:20}{found.get(name, 'none'):>8}  {rule:8}{'met' if met else 'missed'}")
    return all(judged.values())


def _mape(pairs: list[tuple[float, float]]) -> float:
    return round(statistics.mean(abs(predicted / measured - 1.0) for predicted, measured in pairs), 4)


def _print_row(row: Mapping[str, Any]) -> None:
    error = row["predicted_s"] / row["measured_s"] - 1.0
    print(
        f"{row['plan']:18}{row['ranks']:>3} ranks  predicted {row['predicted_s']:8.3f} s  measured"
        f" {row['measured_s']:8.3f} s  {error:+7.1%}  busy {row['busy_s']} s",
        flush=True,
    )
    for name, call in row["calls"].items():
        error = call["predicted_s"] / call["measured_s"] - 1.0
        print(f"    {name:18}{call['predicted_s']:9.3f}{call['measured_s']:9.3f}  {error:+7.1%}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
