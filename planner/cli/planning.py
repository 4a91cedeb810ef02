"""The options of the commands that make, check and explain plans: search, check, estimate, explain, profile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cost_models.engines.constants import DEFAULT_ENGINE
from planner.cli.options import AllowLong, AsJson, EngineName, PlanPath, TablePath, whole
from plans.algorithms import ALGORITHMS
from plans.errors import RealplanError

if TYPE_CHECKING:
    from cost_models.engines.engine import Engine

DEFAULT_CLUSTER = "h100-80gb-sxm"


def _engine(words: str, table: Path | None) -> Engine:
    """The engine that costs are taken from."""
    from planner.cli.engine_words import engine_of

    return engine_of(words, table)


def _inner(folder: Path, words: str, table: Path | None) -> Engine:
    """The engine that the measurements of a run calibrate: the one that is named, else that of the run's plan."""
    from planner.cli.engine_words import engine_of, planned_words
    from plans.checkpoint_files import PLAN

    if words == DEFAULT_ENGINE and table is None:
        words = planned_words(folder / PLAN)
    return engine_of(words, table)


def search(
    model: Annotated[str, typer.Option(help="actor (and every role not given): a name or a folder")] = "",
    critic: Annotated[str, typer.Option(help="critic architecture")] = "",
    reward: Annotated[str, typer.Option(help="reward model architecture")] = "",
    ref: Annotated[str, typer.Option(help="reference model architecture")] = "",
    gpus: Annotated[int | None, whole("GPUs in all (default: one node)")] = None,
    cluster: Annotated[str, typer.Option(help="see `realplan clusters`")] = DEFAULT_CLUSTER,
    gpus_per_node: Annotated[int | None, whole("default: as the cluster has")] = None,
    run: Annotated[Path | None, typer.Option(help="run file to take the workload from")] = None,
    algorithm: Annotated[str | None, typer.Option(help=f"{', '.join(ALGORITHMS)} [ppo]")] = None,
    graph: Annotated[Path | None, typer.Option(help="YAML file with a graph of your own")] = None,
    staleness: Annotated[int, whole("iterations that generation runs ahead, exactly", "--async")] = 0,
    batch_size: Annotated[int | None, whole("prompts per iteration [512]")] = None,
    group_size: Annotated[int | None, whole("samples per prompt [1]")] = None,
    prompt_tokens: Annotated[int | None, whole("longest prompt [1024]")] = None,
    response_tokens: Annotated[int | None, whole("longest response [1024]")] = None,
    mean_response_tokens: Annotated[
        int | None, whole("mean of the long-tailed response lengths [all reach the longest]")
    ] = None,
    lengths: Annotated[
        Path | None,
        typer.Option(
            help="lengths of a run (its folder or metrics.jsonl), or a file with one response length per line"
        ),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(help="output of a run: plan its work again, with its lengths and measured times"),
    ] = None,
    minibatches: Annotated[int | None, whole("optimizer steps per iteration [4]")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32 [bf16]")] = None,
    recompute_logprobs: Annotated[
        bool | None, typer.Option("--recompute-logprobs", help="old log-probs in a call of their own")
    ] = None,
    allow_long: AllowLong = False,
    engine: EngineName = DEFAULT_ENGINE,
    table: TablePath = None,
    method: Annotated[Literal["auto", "exact", "mcmc"], typer.Option(help="how to search")] = "auto",
    seconds: Annotated[float, typer.Option(help="search budget")] = 10.0,
    seed: Annotated[int, whole("random seed")] = 0,
    pin: Annotated[list[str] | None, typer.Option(help="a layout rule, such as actor_train.tp=4")] = None,
    forbid: Annotated[list[str] | None, typer.Option(help="such as 'critic_train.pp>2'; call * is every call")] = None,
    same_mesh: Annotated[
        list[str] | None, typer.Option(help="calls that share a mesh: actor_generate,ref_infer")
    ] = None,
    max_memory: Annotated[str, typer.Option(help="bound per GPU below its memory, such as 72GiB")] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="where the plan goes")] = Path("plan.json"),
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="print what was pruned, and why")] = False,
) -> None:
    """Find the best plan and write it."""
    from planner.best import Effort
    from planner.cli.commands.search import search_command
    from planner.measured import Ran, check_alone, ran
    from planner.request import build_request
    from planner.search.portfolio import Method
    from planner.space.limits import parse_limits
    from plans.graphfile import load_graph

    sizes: dict[str, int | str | bool | None] = {
        "algorithm": algorithm,
        "batch_size": batch_size,
        "group_size": group_size,
        "prompt_tokens": prompt_tokens,
        "response_tokens": response_tokens,
        "mean_response_tokens": mean_response_tokens,
        "minibatches": minibatches,
        "dtype": dtype,
        "recompute_logprobs": recompute_logprobs,
        "allow_long": allow_long or None,
    }
    if graph and algorithm:
        hint = "leave one of the two out"
        raise RealplanError(f"--graph {graph} and --algorithm {algorithm}: both say what an iteration does", hint)
    earlier: Ran | None = None
    models = {"actor": model, "critic": critic, "reward": reward, "ref": ref}
    if measured is not None:
        words = {**models, **sizes, "run": run, "graph": graph, "async": staleness, "lengths": lengths}
        words["cluster"] = cluster != DEFAULT_CLUSTER
        check_alone(measured, {f"--{name.replace('_', '-')}": value for name, value in words.items()})
        earlier = ran(measured, _inner(measured, engine, table))
        request = earlier.request(gpus, gpus_per_node)
    else:
        request = build_request(
            models=models,
            sizes=sizes,
            cluster=cluster,
            gpus=gpus,
            gpus_per_node=gpus_per_node,
            run=run,
            own_graph=load_graph(graph) if graph else None,
            staleness=staleness,
            lengths=lengths,
        )
    calls = [call.name for call in request.workload.graph.model_calls]
    limits = parse_limits(pin or [], forbid or [], same_mesh or [], max_memory, calls)
    raise typer.Exit(
        search_command(
            request,
            engine=earlier.engine if earlier else _engine(engine, table),
            ran=earlier,
            limits=limits,
            effort=Effort(seconds=seconds, seed=seed, workers=os.cpu_count() or 1, method=Method(method)),
            output=output,
            as_json=as_json,
            verbose=verbose,
        )
    )


def check(
    path: PlanPath,
    write: Annotated[bool, typer.Option("--write", help="write the new estimate into the plan")] = False,
    allow_long: AllowLong = False,
    resume_from: Annotated[
        Path | None, typer.Option(help="a checkpoint, or the output of a run: can the plan take it up")
    ] = None,
    engine: EngineName = DEFAULT_ENGINE,
    table: TablePath = None,
    as_json: AsJson = False,
) -> None:
    """Check a plan: is it legal, does it fit, how long will an iteration take."""
    from planner.cli.commands.check import check_command

    settings = {"write": write, "allow_long": allow_long, "as_json": as_json}
    raise typer.Exit(check_command(path, engine=_engine(engine, table), resume_from=resume_from, **settings))


def estimate(
    path: PlanPath,
    engine: EngineName = DEFAULT_ENGINE,
    table: TablePath = None,
    what_if: Annotated[
        list[str] | None, typer.Option(help="gpus=256, inter_node_gbps=200, response_tokens=4096")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict time by call and term, and memory by GPU and term with the moment of the peak."""
    from planner.cli.commands.estimate import estimate_command

    raise typer.Exit(estimate_command(path, engine=_engine(engine, table), changes=what_if or [], as_json=as_json))


def explain(
    path: PlanPath,
    engine: EngineName = DEFAULT_ENGINE,
    table: TablePath = None,
    seconds: Annotated[float, typer.Option(help="for the short searches in all", min=0.1)] = 20.0,
    seed: Annotated[int, whole("random seed")] = 0,
    as_json: AsJson = False,
) -> None:
    """Why this plan: its critical path, what binds, what each call would cost elsewhere, what hardware would bring."""
    from planner.cli.commands.explain import explain_command

    raise typer.Exit(explain_command(path, engine=_engine(engine, table), seconds=seconds, seed=seed, as_json=as_json))


def profile(
    model: Annotated[str, typer.Option(help="architecture: a name or a folder")],
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="what to measure")] = "cuda",
    tp: Annotated[str, typer.Option(help="tensor-parallel degrees [those of 1,2,4,8 that divide the model]")] = "",
    dtype: Annotated[str, typer.Option(help="bf16 or fp32 [bf16 on cuda, fp32 on cpu]")] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="cost table; an unfinished one is taken up")] = Path(
        "table.json"
    ),
) -> None:
    """Measure what a model's operations cost on this machine, on one device for every tp."""
    from profiler.command import profile_command

    raise typer.Exit(profile_command(model, device, tp, dtype, output))


COMMANDS = (search, check, estimate, explain, profile)
