"""Plans of the fixture model, played by the runtime's executor in a world of this check, and what they gave."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_check.setting import FIXTURE, FIXTURES
from plans.algorithms import algorithm_graph
from plans.checks import check_plan
from plans.cluster import parse_mesh
from plans.errors import RealplanError
from plans.library import load_cluster, load_model
from plans.model import ModelSpec
from plans.plan import ExecutionPlan, PlannedCall
from plans.runfile import RunFile
from plans.strategy import ParallelStrategy, parse_degrees
from plans.workload import Workload

Places = Mapping[str, tuple[str, str, Mapping[str, Any]]]
SIZES: Mapping[str, Mapping[str, int]] = {
    "ppo": {"batch_size": 8, "minibatches": 2},
    "grpo": {"batch_size": 2, "group_size": 4, "minibatches": 2},
    "dpo": {"batch_size": 4, "group_size": 2, "minibatches": 2},
    "sft": {"batch_size": 8, "minibatches": 2},
}


@dataclass(frozen=True, kw_only=True)
class Play:
    """A plan to run. limit_bytes: device memory beside the models' (0: all); dies: rank that kills itself."""

    name: str
    plan: ExecutionPlan
    run: RunFile
    limit_bytes: int = 0
    dies: int = -1


@dataclass(frozen=True, kw_only=True)
class Played:
    """Metrics by iteration and tokens by (iteration, sample); error: the message of a run that failed."""

    metrics: Sequence[Mapping[str, float]] = ()
    tokens: Mapping[tuple[int, int], list[int]] = field(default_factory=dict)
    error: str = ""


def fixture_plan(
    algorithm: str,
    ranks: int = 1,
    places: Places | None = None,
    *,
    dtype: str = "fp32",
    spec: ModelSpec | None = None,
    nodes: int = 1,
) -> ExecutionPlan:
    """A plan of the fixture model (or another) for `ranks` ranks of a CPU node, or of equal `nodes`; it runs on any
    device.

    places: call -> (mesh, degrees, settings), `*` for the others; default: everything on the whole cluster, dp.
    """
    cluster = load_cluster("local-cpu", gpus=ranks, gpus_per_node=ranks // nodes)
    model = spec or load_model(str(FIXTURE))
    graph = algorithm_graph(algorithm, reward_seconds_per_sample=1e-4)
    models = {role: model.with_value_head() if role in ("critic", "reward") else model for role in graph.roles}
    sizes = {"prompt_tokens": 8, "response_tokens": 8, "dtype": dtype, **SIZES[algorithm]}
    workload = Workload(graph=graph, models=models, **sizes)
    default = (cluster.whole.text(cluster), f"d{ranks} t1 p1", {})
    calls = []
    for call in graph.model_calls:
        mesh, degrees, settings = (places or {}).get(call.name) or (places or {}).get("*", default)
        strategy = ParallelStrategy(**parse_degrees(degrees), **settings)
        calls.append(PlannedCall(call=call.name, mesh=parse_mesh(mesh, cluster), strategy=strategy))
    plan = ExecutionPlan(workload=workload, cluster=cluster, calls=tuple(calls))
    problems = check_plan(plan)
    if problems:
        raise RealplanError(f"{algorithm} on {ranks} ranks: {problems[0].message}", problems[0].hint)
    return plan


def fixture_run(output: Path, algorithm: str, *, random: bool = False) -> RunFile:
    """Two iterations on the fixture's weights and prompts; `random`: on random weights and tokens."""
    optimizer = {"lr": 3e-4, "clip": 1.0}
    source = _examples(output) if algorithm in ("dpo", "sft") else FIXTURES / "prompts.jsonl"
    real = {"weights": str(FIXTURE), "data": {"source": str(source)}}
    keys = {"weights": "random", "tokenizer": str(FIXTURE)} if random else real
    common = {
        "reward": f"{Path(__file__).with_name('reward.py')}:vowels",
        "actor": optimizer,
        "critic": optimizer,
        "iterations": 2,
    }
    return RunFile.model_validate({**common, **keys, "timeout_s": 300, "output": str(output)})


def _examples(output: Path) -> Path:
    """Given responses of different lengths for the fixture's prompts."""
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, line in enumerate((FIXTURES / "prompts.jsonl").read_text().splitlines()):
        good, bad = " ".join(["good"] * (1 + number % 4)), " ".join(["the", "bad"] * (1 + number % 3))
        rows.append(json.dumps(json.loads(line) | {"response": good, "chosen": good, "rejected": bad}) + "\n")
    path = output / "examples.jsonl"
    path.write_text("".join(rows))
    return path


def play(device: Any, groups: Any, plays: Sequence[Play], folder: Path) -> dict[str, Played]:
    """Run plans one after the other on this rank; collective over the world. Metrics are on rank 0.

    Raises RuntimeError where a plan of several ranks fails, because the others then wait for this one.
    """
    import torch.distributed as dist

    found: dict[str, Played] = {}
    several = dist.get_world_size() > 1
    for one in plays:
        tokens: dict[tuple[int, int], list[int]] = {}
        error = _execute(device, groups, one, folder / one.name, tokens)
        if several and one.dies < 0:
            if error:
                raise RuntimeError(error)
            dist.barrier(group=groups.host(range(dist.get_world_size())))  # all records are written
        metrics = records_of(one.plan, folder / one.name) if dist.get_rank() == 0 and not error else ()
        found[one.name] = Played(metrics=metrics, tokens=tokens, error=error)
    return found


def _execute(device: Any, groups: Any, one: Play, folder: Path, tokens: dict[tuple[int, int], list[int]]) -> str:
    import torch
    import torch.distributed as dist

    from runtime.executor import Executor, StepError
    from runtime.job import prepare_job
    from runtime.reports.records import Recorder

    try:
        executor = Executor(
            prepare_job(one.plan, one.run), groups, device, Recorder(folder, dist.get_rank(), time.time())
        )
        _watch(executor, tokens)
        if one.limit_bytes and device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            most = torch.cuda.memory_reserved(device) + one.limit_bytes
            torch.cuda.set_per_process_memory_fraction(most / total)
        if one.dies == dist.get_rank():
            os.kill(os.getpid(), signal.SIGKILL)
        executor.run(one.run.iterations)
    except (StepError, torch.OutOfMemoryError) as error:
        return str(error)
    finally:
        if one.limit_bytes and device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    return ""


def _watch(executor: Any, tokens: dict[tuple[int, int], list[int]]) -> None:
    """Keep the tokens that this rank generates or receives."""
    store = executor._store
    put = store.put

    def watch(iteration: int, key: str, rows: Sequence[int], values: Any) -> None:
        put(iteration, key, rows, values)
        if key == "sequences":
            held = store.get(iteration, key, rows).texts()
            tokens.update({(iteration, row): prompt + made for row, (prompt, made) in zip(rows, held, strict=True)})

    store.put = watch


def records_of(plan: ExecutionPlan, folder: Path) -> list[Mapping[str, float]]:
    """Metrics by iteration, of the records that all ranks wrote into a folder."""
    from plans.program import compile_program
    from runtime.reports.metrics import iteration_metrics
    from runtime.reports.records import RecordReader

    program = compile_program(plan)
    reader = RecordReader(folder, tuple(r for r in range(plan.cluster.size) if program.projection(r)))
    return [iteration_metrics(program, records) for records in reader.poll()]
