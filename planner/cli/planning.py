"""The options of the commands that make, check and explain plans: search, check, estimate, explain, profile."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cost_models.engines.constants import DEFAULT_ENGINE
from planner.cli import search_options as words
from planner.cli.options import AllowLong, AsJson, EngineName, PlanPath, TablePath, whole
from plans.errors import RealplanError

if TYPE_CHECKING:
    from cost_models.engines.engine import Engine
    from planner.best import Effort
    from planner.measured import Ran
    from planner.request import Request
    from planner.space.limits import Limits
    from plans.cluster import ClusterSpec
    from plans.lora import Lora

DEFAULT_CLUSTER = "h100-80gb-sxm"


def _engine(names: str, table: Path | None) -> Engine:
    """The engine that costs are taken from."""
    from planner.cli.engine_words import engine_of

    return engine_of(names, table)


def _inner(folder: Path, names: str, table: Path | None) -> Engine:
    """The engine that the measurements of a run calibrate: the one that is named, else that of the run's plan."""
    from planner.cli.engine_words import engine_of, planned_words
    from plans.run_output import PLAN

    if names == DEFAULT_ENGINE and table is None:
        names = planned_words(folder / PLAN)
    return engine_of(names, table)


def _lora(rank: int | None, alpha: float | None) -> Lora | None:
    """The adapters that the options ask for."""
    from plans.lora import Lora

    if rank is None and alpha is not None:
        raise RealplanError(f"--lora-alpha {alpha:g} without --lora-rank", "--lora-rank 16, for example")
    return None if rank is None else Lora(rank, alpha)


def _request(graph: Path | None, sizes: Mapping[str, int | str | bool | None], **flags: Any) -> Request:
    """What is to be planned; a graph of one's own says itself what an iteration does."""
    from planner.request import build_request
    from plans.graphfile import load_graph

    if graph and sizes["algorithm"]:
        hint = "leave one of the two out"
        rule = "both say what an iteration does"
        raise RealplanError(f"--graph {graph} and --algorithm {sizes['algorithm']}: {rule}", hint)
    if graph and sizes["router_replay"]:
        hint = "`routes` among the outputs of its generate call and the inputs of the calls that replay them"
        raise RealplanError(f"--graph {graph} and --router-replay: a graph of one's own says itself who replays", hint)
    return build_request(sizes=sizes, own_graph=load_graph(graph) if graph else None, **flags)


def _ran(measured: Path | None, engine: str, table: Path | None, flags: Mapping[str, object]) -> Ran | None:
    """The run whose work is planned again, which says all that other options say."""
    from planner.measured import check_alone, ran

    if measured is None:
        return None
    check_alone(measured, {f"--{name.replace('_', '-')}": value for name, value in flags.items()})
    return ran(measured, _inner(measured, engine, table))


def _effort(seconds: float, seed: int, method: str) -> Effort:
    from planner.best import Effort
    from planner.search.portfolio import Method

    return Effort(seconds=seconds, seed=seed, workers=os.cpu_count() or 1, method=Method(method))


def _with_kept(limits: Limits, path: Path, calls: list[str], cluster: ClusterSpec) -> Limits:
    """Limits, and those that a plan was searched under; of two bounds on memory the one given now."""
    from planner.cli.output import say
    from planner.space.kept import kept_limits
    from plans.codec import load_plan

    kept, dropped = kept_limits(path, load_plan(path), calls, cluster)
    if dropped:
        say(f"without {', '.join(dropped)}: {cluster.size} devices on {cluster.nodes} nodes cannot meet that")
    return limits.with_earlier(kept)


def search(
    model: words.ActorModel = "", critic: words.CriticModel = "", reward: words.RewardModel = "",
    ref: words.RefModel = "", gpus: words.Gpus = None, cluster: words.ClusterName = DEFAULT_CLUSTER,
    gpus_per_node: words.GpusPerNode = None, run: words.RunFilePath = None, algorithm: words.AlgorithmName = None,
    graph: words.GraphPath = None, staleness: words.Staleness = 0, batch_size: words.BatchSize = None,
    group_size: words.GroupSize = None, prompt_tokens: words.PromptTokens = None,
    response_tokens: words.ResponseTokens = None, mean_prompt_tokens: words.MeanPromptTokens = None,
    mean_response_tokens: words.MeanResponseTokens = None, lengths: words.LengthsPath = None,
    prompt_lengths: words.PromptLengthsPath = None, measured: words.MeasuredRun = None,
    minibatches: words.Minibatches = None, dtype: words.Dtype = None,
    recompute_logprobs: words.RecomputeLogprobs = None, router_replay: words.RouterReplay = None,
    lora_rank: words.LoraRank = None, lora_alpha: words.LoraAlpha = None, allow_long: AllowLong = False,
    engine: EngineName = DEFAULT_ENGINE, table: TablePath = None, method: words.MethodName = "auto",
    seconds: words.Seconds = 10.0, seed: words.Seed = 0, pin: words.Pins = None, forbid: words.Forbidden = None,
    same_mesh: words.SameMesh = None, max_memory: words.MaxMemory = "", limits_of: words.LimitsOf = None,
    output: words.PlanTarget = Path("plan.json"), as_json: AsJson = False, verbose: words.Verbose = False,
) -> None:  # fmt: skip
    """Find the best plan and write it."""
    from planner.cli.commands.search import search_command
    from planner.space.limits import parse_limits

    sizes = {
        "algorithm": algorithm, "batch_size": batch_size, "group_size": group_size, "prompt_tokens": prompt_tokens,
        "response_tokens": response_tokens, "mean_prompt_tokens": mean_prompt_tokens,
        "mean_response_tokens": mean_response_tokens, "minibatches": minibatches, "dtype": dtype,
        "recompute_logprobs": recompute_logprobs, "router_replay": router_replay,
        "allow_long": allow_long or None,
    }  # fmt: skip
    models = {"actor": model, "critic": critic, "reward": reward, "ref": ref}
    flags = {"run": run, "graph": graph, "async": staleness, "lora_rank": lora_rank}
    files = {"lengths": lengths, "prompt_lengths": prompt_lengths}
    earlier = _ran(
        measured, engine, table, {**models, **sizes, **flags, **files, "cluster": cluster != DEFAULT_CLUSTER}
    )
    request = earlier.request(gpus, gpus_per_node) if earlier else _request(
        graph, sizes, models=models, cluster=cluster, gpus=gpus, gpus_per_node=gpus_per_node, run=run,
        staleness=staleness, lora=_lora(lora_rank, lora_alpha), **files,
    )  # fmt: skip
    calls = [call.name for call in request.workload.graph.model_calls]
    limits = parse_limits(pin or [], forbid or [], same_mesh or [], max_memory, calls)
    if limits_of is not None:
        limits = _with_kept(limits, limits_of, calls, request.cluster)
    effort = _effort(seconds, seed, method)
    raise typer.Exit(search_command(
        request, engine=earlier.engine if earlier else _engine(engine, table), ran=earlier, limits=limits,
        effort=effort, output=output, as_json=as_json, verbose=verbose,
    ))  # fmt: skip


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
