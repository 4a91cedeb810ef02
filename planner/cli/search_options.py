"""What `realplan search` can be told: of the work, of the machines, of the search, of the layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from planner.cli.options import whole
from plans.algorithms import ALGORITHMS

Count = int | None
Rules = list[str] | None

ActorModel = Annotated[str, typer.Option(help="actor (and every role not given): a name or a folder")]
CriticModel = Annotated[str, typer.Option(help="critic architecture")]
RewardModel = Annotated[str, typer.Option(help="reward model architecture")]
RefModel = Annotated[str, typer.Option(help="reference model architecture")]

Gpus = Annotated[Count, whole("GPUs in all (default: one node)")]
ClusterName = Annotated[str, typer.Option(help="see `realplan clusters`")]
GpusPerNode = Annotated[Count, whole("default: as the cluster has")]

RunFilePath = Annotated[Path | None, typer.Option(help="run file to take the workload from")]
AlgorithmName = Annotated[str | None, typer.Option(help=f"{', '.join(ALGORITHMS)} [ppo]")]
GraphPath = Annotated[Path | None, typer.Option(help="YAML file with a graph of your own")]
Staleness = Annotated[int, whole("iterations that generation runs ahead, exactly", "--async")]

BatchSize = Annotated[Count, whole("prompts per iteration [512]")]
GroupSize = Annotated[Count, whole("samples per prompt [1]")]
PromptTokens = Annotated[Count, whole("longest prompt [1024]")]
ResponseTokens = Annotated[Count, whole("longest response [1024]")]
MeanPromptTokens = Annotated[Count, whole("mean of the long-tailed prompt lengths [all reach the longest]")]
MeanResponseTokens = Annotated[Count, whole("mean of the long-tailed response lengths [all reach the longest]")]
LengthsPath = Annotated[
    Path | None,
    typer.Option(help="lengths of a run (its folder or metrics.jsonl), or a file with one response length per line"),
]
PromptLengthsPath = Annotated[
    Path | None,
    typer.Option(help="prompt lengths of a run, or a file with one prompt length per line"),
]
MeasuredRun = Annotated[
    Path | None, typer.Option(help="output of a run: plan its work again, with its lengths and measured times")
]
Minibatches = Annotated[Count, whole("optimizer steps per iteration [4]")]
Dtype = Annotated[str | None, typer.Option(help="bf16, fp16 or fp32 [bf16]")]
LoraRank = Annotated[int | None, whole("train the actor through LoRA adapters of this rank")]
LoraAlpha = Annotated[float | None, typer.Option(help="adapters count alpha / rank [twice the rank]")]
RecomputeLogprobs = Annotated[
    bool | None, typer.Option("--recompute-logprobs", help="old log-probs in a call of their own")
]
RouterReplay = Annotated[
    bool | None, typer.Option("--router-replay", help="the actor trains on the experts that generation chose")
]

MethodName = Annotated[Literal["auto", "exact", "mcmc"], typer.Option(help="how to search")]
Seconds = Annotated[float, typer.Option(help="search budget")]
Seed = Annotated[int, whole("random seed")]

Pins = Annotated[Rules, typer.Option(help="a layout rule, such as actor_train.tp=4")]
Forbidden = Annotated[Rules, typer.Option(help="such as 'critic_train.pp>2'; call * is every call")]
SameMesh = Annotated[Rules, typer.Option(help="calls that share a mesh: actor_generate,ref_infer")]
LimitsOf = Annotated[
    Path | None, typer.Option(help="a plan: keep the limits that it was searched under, as far as there are devices")
]
MaxMemory = Annotated[str, typer.Option(help="bound per GPU below its memory, such as 72GiB")]

PlanTarget = Annotated[Path, typer.Option("--output", "-o", help="where the plan goes")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="print what was pruned, and why")]
