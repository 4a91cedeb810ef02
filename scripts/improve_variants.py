"""Train every variant of every algorithm for a minute and see that its objective rises.

    python scripts/improve_variants.py [--only NAME ...] [--iterations 15] [--output runs/variants]

Runs of the one-million-parameter fixture on one rank of the CPU. Where responses are generated the
objective is the reward, the share of vowels in a response, else the loss with its sign turned. A variant improves when
the mean of its last five iterations is above that of its first five by two standard errors of their difference. Every
run leaves its curves in `report.html`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from plans.algorithms import algorithm_graph
from plans.cluster import parse_mesh
from plans.codec import save_plan
from plans.errors import RealplanError
from plans.library import load_cluster, load_model
from plans.plan import ExecutionPlan, PlannedCall
from plans.runfile import RunFile
from plans.strategy import ParallelStrategy
from plans.workload import Workload

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
TAIL = 5
ERRORS = 2.0
MOST_S = 600.0
"""For one run, on a busy machine."""


def vowels(responses: list[str]) -> list[float]:
    """The share of vowels in each response."""
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in responses]


def vowels_or_not(response: str) -> float:
    """The same, and a mistake for some responses."""
    if len(response) % 7 == 0:
        raise ValueError("no score for this one")
    return vowels([response])[0]


def many_vowels(responses: list[str]) -> list[float]:
    """1 for responses with many vowels, 0 for others, so that many groups have no spread."""
    return [float(share > 0.35) for share in vowels(responses)]


@dataclass(frozen=True, slots=True)
class Variant:
    """An algorithm with keys of its run file. graph: what the graph of the algorithm is asked for."""

    algorithm: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    graph: Mapping[str, Any] = field(default_factory=dict)

    @property
    def grouped(self) -> bool:
        """Whether it compares the responses to one prompt."""
        return self.algorithm in ("grpo", "rloo")


def _ppo(**keys: Any) -> dict[str, Any]:
    return {"ppo": {"kl_coefficient": 0.01, **keys}}


VARIANTS: dict[str, Variant] = {
    "ppo": Variant("ppo"),
    "ppo, value warm-up": Variant("ppo", _ppo(critic_warmup_iterations=3)),
    "ppo, adaptive KL": Variant("ppo", _ppo(kl_target=6.0, kl_horizon=500)),
    "ppo, recomputed log-probs, TIS": Variant("ppo", _ppo(importance_cap=2.0), {"recompute_logprobs": True}),
    "grpo": Variant("grpo"),
    "grpo, KL in the reward, k2": Variant("grpo", _ppo(kl_in="reward", kl_estimator="k2")),
    "grpo, entropy bonus": Variant("grpo", _ppo(entropy_coefficient=0.003)),
    "dapo": Variant("grpo", _ppo(clip_high=0.28, overlong_tokens=2, overlong_penalty=0.1, train_prompts=4)
                    | {"reward": "many_vowels"}),
    "dr. grpo": Variant("grpo", _ppo(divide_by_deviation=False, loss_average="constant")),
    "grpo, dual clip, averages of responses": Variant("grpo", _ppo(dual_clip=3.0, loss_average="sequence")),
    "gspo": Variant("grpo", _ppo(ratio="sequence", loss_average="sequence", clip=0.2)),
    "grpo, failed rewards dropped": Variant(
        "grpo", {"reward": "vowels_or_not", "reward_limits": {"on_failure": "drop"}}
    ),
    "grpo, the reference follows": Variant("grpo", {"reference": {"every": 5, "mix": 0.6}}),
    "grpo, one iteration ahead": Variant("grpo", graph={"staleness": 1}),
    "grpo, one iteration ahead, TIS": Variant(
        "grpo", _ppo(importance_cap=2.0), {"staleness": 1, "recompute_logprobs": True}
    ),
    "grpo, cosine": Variant("grpo", {"actor": {"lr": 3e-3, "warmup_steps": 2, "schedule": "cosine", "final_lr": 0.1}}),
    "rloo": Variant("rloo"),
    "remax": Variant("remax"),
    "reinforce++": Variant("reinforce++"),
    "sft": Variant("sft", {"actor": {"lr": 2e-4}}),
    "dpo": Variant("dpo", {"actor": {"lr": 2e-4}}),
    "reward-modelling": Variant("reward-modelling", {"actor": {"lr": 2e-4}}),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a variant reached: means of its first and last iterations, the standard error of their difference."""

    first: float
    last: float
    error: float
    seconds: float

    @property
    def improves(self) -> bool:
        """Whether it rose beyond its noise."""
        return self.last - self.first > ERRORS * self.error


def main() -> int:
    """Run the variants, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(VARIANTS), help="variants by name")
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "variants")
    options = parser.parse_args()
    console, found = Console(), dict[str, Outcome | None]()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for name in options.only:
            output = options.output / name.replace(" ", "-").replace(",", "")
            found[name] = outcome = improve(name, options.iterations, output, world)
            said = "failed" if outcome is None else "improves" if outcome.improves else "does not improve"
            console.print(f"{name}: {said}")
    console.print(shown(found))
    return 0 if all(outcome is not None and outcome.improves for outcome in found.values()) else 1


def shown(found: Mapping[str, Outcome | None]) -> Table:
    """The outcomes as a table."""
    table = Table("variant", "first five", "last five", "standard errors", "seconds")
    for name, o in found.items():
        if o is None:
            table.add_row(name, "failed", "", "", "")
        else:
            errors = (o.last - o.first) / o.error if o.error else float("inf")
            table.add_row(name, f"{o.first:+.3f}", f"{o.last:+.3f}", f"{errors:.1f}", f"{o.seconds:.0f}")
    return table


class World:
    """A world of one rank in this process, so that torch is loaded once for all runs."""

    def __init__(self, folder: Path) -> None:
        import torch
        import torch.distributed as dist

        from runtime.groups import GroupCache
        from runtime.models.installation import install

        torch.set_num_threads(1)
        self._device = torch.device("cpu")
        install(self._device)
        store = dist.FileStore(str(folder / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        self._groups = GroupCache(self._device)

    def run(self, plan: ExecutionPlan, run: RunFile) -> list[dict[str, float]]:
        """Metrics of a run, whose files are in its output."""
        import torch.distributed as dist

        from runtime.checkpoints.course import run_iterations
        from runtime.checkpoints.stopping import StopAgreement
        from runtime.executor import Executor
        from runtime.job import prepare_job
        from runtime.reports.monitor import Monitor
        from runtime.reports.page import write_page
        from runtime.reports.records import Recorder

        output = Path(run.output)
        scratch = output / ".ranks"
        recorder, job = Recorder(scratch, 0, time.time()), prepare_job(plan, run)
        try:
            executor = Executor(job, self._groups, self._device, recorder)
            with Monitor(plan, run.iterations, scratch, output) as monitor:
                stop = StopAgreement(scratch, dist.HashStore(), timedelta(seconds=MOST_S))
                run_iterations(executor, run, recorder, stop)
        finally:
            if job.reward is not None:
                job.reward.close()
        save_plan(plan, output / "plan.json")
        print(write_page(output), file=sys.stderr)
        return list(monitor.lines)


def improve(name: str, iterations: int, output: Path, world: World) -> Outcome | None:
    """Run a variant; None where the run fails."""
    variant, began = VARIANTS[name], time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    try:
        lines = world.run(plan_of(variant), run_of(variant, iterations, output))
    except RealplanError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return None
    return judged([objective(variant, line) for line in lines], time.monotonic() - began)


def judged(values: Sequence[float], seconds: float) -> Outcome:
    """The first and the last five of some values, and the standard error of the difference of their means."""
    first, last = values[:TAIL], values[-TAIL:]
    error = sum(statistics.variance(part) / len(part) for part in (first, last)) ** 0.5
    return Outcome(statistics.fmean(first), statistics.fmean(last), error, seconds)


def objective(variant: Variant, line: Mapping[str, float]) -> float:
    """What a variant should raise."""
    for role in ("actor", "reward"):
        if f"{role}/loss" in line:
            return -line[f"{role}/loss"]
    return line["critic/score/mean"]


def plan_of(variant: Variant) -> ExecutionPlan:
    """One rank that does everything."""
    cluster = load_cluster("local-cpu", gpus=1, gpus_per_node=1)
    spec = load_model(str(FIXTURES / "tiny-llama"))
    graph = algorithm_graph(variant.algorithm, reward_seconds_per_sample=1e-4, **variant.graph)
    models = {role: spec.with_value_head() if role in ("critic", "reward") else spec for role in graph.roles}
    group = 4 if variant.grouped else 2 if variant.algorithm in ("dpo", "reward-modelling") else 1
    workload = Workload(graph=graph, models=models, batch_size=32 // group, group_size=group, prompt_tokens=8,
                        response_tokens=8, minibatches=2, dtype="fp32")  # fmt: skip
    mesh, lags = parse_mesh("node 0", cluster), graph.first_lags
    calls = [PlannedCall(call=call.name, mesh=mesh, strategy=ParallelStrategy(), lag=lags[call.name])
             for call in graph.model_calls]  # fmt: skip
    return ExecutionPlan(workload=workload, cluster=cluster, calls=tuple(calls))


def run_of(variant: Variant, iterations: int, output: Path) -> RunFile:
    """The run file of a variant; examples where the algorithm learns from given responses."""
    optimizer = {"lr": 3e-3, "warmup_steps": 2}
    run: dict[str, Any] = {
        "weights": str(FIXTURES / "tiny-llama"), "data": {"source": str(FIXTURES / "prompts.jsonl")},
        "actor": optimizer, "critic": optimizer, "iterations": iterations, "output": str(output), "seed": 1,
        "report": False, "checkpoint": {"every": 0}, "export": False, "timeout_s": MOST_S, **_ppo(), **variant.keys,
    }  # fmt: skip
    if variant.algorithm in ("sft", "dpo", "reward-modelling"):
        run["data"] = {"source": str(examples(output / "examples.jsonl"))}
    else:
        run["reward"] = f"{Path(__file__).resolve()}:{run.get('reward', 'vowels')}"
    return RunFile.model_validate(run)


def examples(path: Path) -> Path:
    """The prompts of the fixture with a good and a bad response each."""
    prompts = [json.loads(line)["prompt"] for line in (FIXTURES / "prompts.jsonl").read_text().splitlines()]
    good, bad = ["good", "good good", "good movie"], ["the bad", "bad bad"]
    rows = [
        {"prompt": prompt, "response": good[i % 3], "chosen": good[i % 3], "rejected": bad[i % 2]}
        for i, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


if __name__ == "__main__":
    raise SystemExit(main())
