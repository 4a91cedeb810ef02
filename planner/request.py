"""From command-line words to a workload and a cluster; the only place that knows the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from plans.algorithms import ALGORITHMS, algorithm_graph
from plans.checks import sample_problems
from plans.cluster import MOST_GPUS, ClusterSpec
from plans.codec import lora_of
from plans.errors import SpecError
from plans.graph import MOST_STALENESS, DataflowGraph
from plans.lengths import percentiles_of
from plans.lengthsfile import lengths_file
from plans.library import load_cluster, load_model
from plans.lora import Lora
from plans.model import ModelSpec
from plans.problems import shortened
from plans.runfile import RunFile, RunWorkload, load_run
from plans.workload import Workload, role_spec, with_lora

PYTHON_REWARD_SECONDS = 1e-3
PARTS = ("prompt", "response")
"""Parts of a sample that have lengths."""
MOST_SECONDS = 1e6
MOST_SEED = 2**63 - 1


def check_range(option: str, value: float | None, least: float, most: float, example: float) -> None:
    """Raise unless an option that is given lies in its range."""
    if value is not None and not least <= value <= most:
        rule = f"it must be from {least:,} to {most:,}"
        raise SpecError(f"{option} is {shortened(value)}; {rule}", f"`{option} {example}`, for example")


def check_effort(seconds: float, seed: int) -> None:
    """Raise unless a search can take `seconds` and start from `seed`."""
    check_range("--seconds", seconds, 0, MOST_SECONDS, 10)
    check_range("--seed", seed, 0, MOST_SEED, 0)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be planned, and the run file it came from (None: flags alone)."""

    workload: Workload
    cluster: ClusterSpec
    run: Path | None


def build_request(
    *,
    models: Mapping[str, str],
    sizes: Mapping[str, int | str | bool | None] = MappingProxyType({}),
    lora: Lora | None = None,
    cluster: str = "h100-80gb-sxm",
    gpus: int | None = None,
    gpus_per_node: int | None = None,
    run: Path | None = None,
    own_graph: DataflowGraph | None = None,
    staleness: int = 0,
    lengths: Path | None = None,
    prompt_lengths: Path | None = None,
) -> Request:
    """Flags over the run file's workload over the defaults. `models` are role -> name, empty where not given; `sizes`
    are the other keys of `RunWorkload`, None where not given. lora: adapters of the actor, in the place of the run
    file's. lengths, prompt_lengths: files that lengths are taken from, all there are and those of prompts."""
    check_range("--gpus", gpus, 1, MOST_GPUS, 8)
    check_range("--gpus-per-node", gpus_per_node, 1, MOST_GPUS, 8)
    check_range("--async", staleness, 0, MOST_STALENESS, 1)
    file = load_run(run) if run else RunFile()
    given = {key: value for key, value in sizes.items() if value is not None}
    wanted = _with_lengths(file.workload.model_copy(update=given), given, lengths, prompt_lengths)
    names = {**wanted.models, **{role: name for role, name in models.items() if name}}
    actor = names.get("actor") or (file.weights_of("actor") if run else "")
    if not actor:
        raise SpecError("no model is given", "--model llama-70b, or --run FILE with workload.models.actor")
    function = bool(file.reward) and "reward" not in names
    graph = replace(own_graph, staleness=staleness) if own_graph else _graph(wanted, function, staleness)
    specs = {role: role_spec(role, load_model(names.get(role, actor))) for role in graph.roles}
    workload = _workload(graph, with_lora(graph, specs, lora or lora_of(wanted.lora)), wanted)
    for problem in sample_problems(workload):
        raise SpecError(problem.message, problem.hint)
    return Request(workload=workload, cluster=load_cluster(cluster, gpus=gpus, gpus_per_node=gpus_per_node), run=run)


def _graph(wanted: RunWorkload, function: bool, staleness: int) -> DataflowGraph:
    """The graph of a named algorithm; function: its reward is one of Python."""
    return algorithm_graph(
        wanted.algorithm,
        recompute_logprobs=wanted.recompute_logprobs,
        router_replay=wanted.router_replay,
        reward_seconds_per_sample=PYTHON_REWARD_SECONDS if function else None,
        staleness=staleness,
    )


def _workload(graph: DataflowGraph, specs: Mapping[str, ModelSpec], wanted: RunWorkload) -> Workload:
    return Workload(
        graph=graph,
        models=specs,
        batch_size=wanted.batch_size,
        group_size=_group_size(graph, wanted),
        prompt_tokens=wanted.prompt_tokens,
        response_tokens=wanted.response_tokens,
        mean_prompt_tokens=wanted.mean_prompt_tokens,
        mean_response_tokens=wanted.mean_response_tokens,
        prompt_lengths=percentiles_of(wanted.prompt_lengths),
        response_lengths=percentiles_of(wanted.response_lengths),
        minibatches=wanted.minibatches,
        dtype=wanted.dtype,
        allow_long=wanted.allow_long,
    )


def _group_size(graph: DataflowGraph, wanted: RunWorkload) -> int:
    """Samples per prompt: as many as the data has responses, else what was asked for, else the algorithm's own."""
    record = ALGORITHMS.get(graph.name)
    if record is None:
        return wanted.group_size
    given = "group_size" in wanted.model_fields_set
    if record.offline and wanted.group_size == 1:
        return len(record.responses)
    return wanted.group_size if given else record.group_size


def _with_lengths(
    wanted: RunWorkload, given: Mapping[str, int | str | bool], lengths: Path | None, prompt_lengths: Path | None
) -> RunWorkload:
    """The workload with the lengths of options, in the place of what the run file says of the same part of a sample.
    `--lengths` may hold prompts too: there what is said of prompts alone counts."""
    for option, path, mean in (("--lengths", lengths, "response"), ("--prompt-lengths", prompt_lengths, "prompt")):
        if path and f"mean_{mean}_tokens" in given:
            raise SpecError(
                f"{option} {path} and --mean-{mean}-tokens: both say how long a {mean} is", "one of the two"
            )
    read = partial(lengths_file, prompt_tokens=wanted.prompt_tokens, response_tokens=wanted.response_tokens)
    found = read(lengths) if lengths else {}
    alone = read(prompt_lengths, part="prompt") if prompt_lengths else {}
    for part in PARTS:
        own = {key: value for key, value in {**given, **alone}.items() if key in _length_keys(part)}
        own = own or {key: value for key, value in found.items() if key in _length_keys(part)}
        if own:
            blank = dict(zip(_length_keys(part), (0, {}), strict=True))
            wanted = wanted.model_copy(update={**blank, **own})
    return wanted


def _length_keys(part: str) -> tuple[str, str]:
    """The keys of a workload that say how long a part of a sample is: a mean, and percentiles."""
    return f"mean_{part}_tokens", f"{part}_lengths"
