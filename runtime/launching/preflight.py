"""What can be wrong before a rank starts: the plan, its estimate, weights that do not fit, devices, packages."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plans.algorithms import is_offline
from plans.checks import sample_problems
from plans.codec import BadPlan, is_stale, plan_text
from plans.documents import locate
from plans.errors import RealplanError
from plans.huggingface import check_runs, spec_from_folder
from plans.model import Head, ModelSpec
from plans.plan import ExecutionPlan
from plans.runfile import RANDOM, RunFile, load_run, patience_s

PACKAGES = {
    "torch": "torch",
    "megatron.core": "megatron-core",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
}


def check_samples(plan: ExecutionPlan, path: Path, allow_long: bool) -> ExecutionPlan:
    """The plan, which may now insist on samples beyond a context; raises BadPlan where its models cannot take them."""
    if allow_long:
        plan = replace(plan, workload=replace(plan.workload, allow_long=True))
    problems = sample_problems(plan.workload)
    if problems:
        raise BadPlan(str(path), locate(plan_text(path), problems))
    return plan


def check_estimate(plan: ExecutionPlan, path: Path) -> None:
    """Raise when the estimate belongs to another plan."""
    if is_stale(plan):
        raise RealplanError(
            f"{path}: the estimate is stale: it belongs to another state of the plan, or its figures were edited",
            f"`realplan check --write {path}`, or --allow-stale to run it all the same",
        )


def read_run(plan: ExecutionPlan, plan_path: Path, run_path: Path | None, overrides: list[str]) -> RunFile:
    """The run file named on the command line, else the plan's own, else the defaults; with overrides, and with a
    `timeout_s` that the plan can keep. Raises where the one that is given is shorter than a call of the plan."""
    if run_path is None and plan.run:
        run_path = plan_path.parent / plan.run
    run = load_run(run_path, overrides)
    if not run.timeout_s:
        return run.model_copy(update={"timeout_s": patience_s(plan, run)})
    calls_s = plan.estimate.calls_s if plan.estimate else {}
    call = max(calls_s, key=lambda name: calls_s[name], default="")
    if call and calls_s[call] >= run.timeout_s:
        raise RealplanError(
            f"timeout_s is {run.timeout_s:g}, and `{call}` alone takes {calls_s[call]:.4g} s by the plan's estimate",
            f"timeout_s={3 * calls_s[call]:.0f}, or leave it out",
        )
    return run


def check_rollback(plan: ExecutionPlan, run: RunFile, *, alone: bool) -> None:
    """A run that may go back can: its ranks are started by this process, and there is a KL where one is bounded."""
    if run.rolls_back and not alone:
        raise RealplanError(
            "on_nonfinite: rollback and kl_bound need a run that realrun starts itself",
            "on_nonfinite=skip or stop, kl_bound=null",
        )
    graph = plan.workload.graph
    scored = any(key.startswith("ref_logprobs") for call in graph.calls for key in call.outputs)
    if run.kl_bound is not None and (not scored or is_offline(graph)):
        raise RealplanError(f"kl_bound: `{graph.name}` measures no KL of responses to a reference", "kl_bound=null")


def check_weights(plan: ExecutionPlan, run: RunFile, *, alone: bool = True) -> None:
    """Every role has weights, and those of a folder have the architecture of the plan. Where this machine is not
    `alone`, another one may have the folder."""
    for role in plan.workload.graph.roles:
        weights = run.weights_of(role)
        if not weights:
            raise RealplanError(
                f"no weights for `{role}`: the run file names none", "weights=FOLDER, or weights=random for benchmarks"
            )
        if weights == RANDOM:
            continue
        if not alone and not os.path.lexists(weights):
            print(
                f"weights `{weights}` of `{role}` are not on this machine: another one must have them", file=sys.stderr
            )
            continue
        if not os.path.isdir(weights):
            raise RealplanError(f"weights `{weights}` of `{role}`: no such folder", "weights=FOLDER or weights=random")
        found, planned = spec_from_folder(Path(weights)), plan.workload.models[role]
        check_runs(Path(weights))
        different = _differences(found, planned)
        if different:
            name, (theirs, ours) = next(iter(different.items()))
            raise RealplanError(
                f"weights `{weights}` do not fit `{role}`: {name} is {theirs} there and {ours} in the plan",
                f"the plan's model is `{planned.name}`; name its weights, or plan for the other model",
            )
        _check_tensors(Path(weights), planned, trained=role in plan.workload.graph.trainers)


def _check_tensors(folder: Path, spec: ModelSpec, *, trained: bool) -> None:
    """The files of a folder hold the tensors of the model, and no others; a head too where nothing trains one."""
    check_packages()
    from runtime.weights.hf_files import WeightFiles

    WeightFiles(folder, "np").check(spec, trained=trained)


def _differences(found: ModelSpec, planned: ModelSpec) -> dict[str, tuple[Any, Any]]:
    """Fields of the architecture that differ; a value head replaces whatever head the folder has."""
    free = {"name", "head", "max_context"} | ({"tied_embeddings"} if planned.head is Head.VALUE else set())
    theirs, ours = asdict(found), asdict(planned.base)
    return {k: (theirs[k], ours[k]) for k in ours if k not in free and theirs[k] != ours[k]}


def check_packages() -> None:
    """The packages of the runtime are installed."""
    for module, package in PACKAGES.items():
        if find_spec(module.partition(".")[0]) is None:
            raise RealplanError(f"running a plan needs {package}", "pip install 'realplan[run]'")


def check_devices(plan: ExecutionPlan, ranks: int | None, *, alone: bool = True) -> None:
    """Enough devices for every rank of the plan, or for those of a node where this machine is not `alone`. `ranks`: how
    many another launcher has started."""
    size = plan.cluster.size if alone else plan.cluster.gpus_per_node
    if ranks is not None:
        if ranks != size:
            raise RealplanError(
                f"the plan needs {size} ranks, WORLD_SIZE={ranks} of the environment says that {ranks} were started",
                f"start {size} processes, or unset RANK and WORLD_SIZE: then realrun starts the ranks itself",
            )
        return
    if plan.cluster.gpu.name == "cpu":
        return
    import torch

    found = torch.cuda.device_count()
    if found < size:
        raise RealplanError(
            f"the plan needs {size} ranks, this machine has {found} CUDA devices",
            f"a plan for `--gpus {found}`" if found else "a plan for `--cluster local-cpu`, or a machine with GPUs",
        )


def check_job(plan: ExecutionPlan, run: RunFile) -> None:
    """Read data, tokenizer and reward as the ranks do, and let them go. Loads torch."""
    from runtime.job import prepare_job

    job = prepare_job(plan, run)
    if job.reward is not None:
        try:
            job.reward.ready()
        finally:
            job.reward.close()
