"""The run file (YAML): on which data, from which weights, with which reward and hyperparameters, and where to write.

The plan says what runs where; this says the rest. `realplan search --run FILE` takes the workload from it, `realrun`
reads it and accepts dotted overrides (`ppo.kl_coefficient=0.05`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from plans.documents import BadText, read_text, refuse
from plans.errors import RealplanError
from plans.hyperparameters import Above, Closed, Count, Dpo, Optimizer, Positive, Ppo
from plans.plan import ExecutionPlan
from plans.planfile import LoraFile
from plans.problems import REFUSED, Problem, shortened
from plans.shapes import shape_problems
from plans.yaml_text import MOST_YAML_BYTES, Yaml, parse_yaml

RANDOM = "random"
MOVIE_REVIEWS = "movie-reviews"
LEAST_PATIENCE_S = 300.0
CHECKPOINTS = "checkpoints"


class RunFileError(RealplanError):
    """A run file that cannot be used."""


def _temperature(value: float) -> float:
    if value and not 1e-3 <= value <= 1e3:
        raise PydanticCustomError(REFUSED, "it must be 0 or from 0.001 to 1,000", {"hint": '"temperature": 1.0'})
    return value


class RunWorkload(Closed):
    """What `realplan search --run` plans for; keys as in the plan file. `models` are library names or folders;
    a role that is left out takes the actor's architecture."""

    algorithm: str = "ppo"
    batch_size: Positive = 512
    group_size: Positive = 1
    prompt_tokens: Positive = 1024
    response_tokens: Positive = 1024
    mean_prompt_tokens: Count = 0
    mean_response_tokens: Count = 0
    prompt_lengths: dict[str, Count] = Field(default_factory=dict)
    response_lengths: dict[str, Count] = Field(default_factory=dict)
    minibatches: Positive = 4
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    recompute_logprobs: bool = False
    router_replay: bool = False
    allow_long: bool = False
    lora: LoraFile | None = None
    models: dict[str, str] = Field(default_factory=dict)


class DataPart(Closed):
    """A file or folder of a mixture; an epoch uses its rows `weight` times."""

    path: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0


class Data(Closed):
    """What a run learns from. source: a .jsonl, .csv or .parquet file, a folder of them or one that `datasets` has
    saved, a list of {path, weight}, or `movie-reviews` (needs that package).

    prompt, response, chosen, rejected, answer: names of the columns, where they are others. A prompt is a text, or a
    conversation (a list of messages; column `messages` where there is no prompt). SFT needs a column `response` as well
    (or a conversation that ends with the assistant), DPO and reward modelling `chosen` and `rejected`. Every column is
    a parameter that rewards can ask for by name, `answer` also under that name.

    Prompt and response are tokenized apart and joined without a space. chat: put texts into the chat template of the
    tokenizer as a user's message (conversations always are; one that ends with the assistant is continued there);
    system: the message before it; template: further values that the template reads, such as enable_thinking.
    """

    source: str | Annotated[tuple[DataPart, ...], Field(strict=False, min_length=1)] = ""
    prompt: str = ""
    response: str = ""
    chosen: str = ""
    rejected: str = ""
    answer: str = ""
    chat: bool = False
    system: str = ""
    template: dict[str, bool | int | float | str] = Field(default_factory=dict)
    shuffle: bool = True
    max_prompts: Count = 0

    @property
    def parts(self) -> tuple[DataPart, ...]:
        """Files and folders with their weights; none of a source that is no path."""
        if isinstance(self.source, str):
            return (DataPart(path=self.source),) if self.source else ()
        return self.source

    def column(self, name: str) -> str:
        """The column that holds the texts of a name."""
        return getattr(self, name) or name


class RunSampling(Closed):
    """How responses are drawn. temperature 0 takes the likeliest token; top_k 0, top_p 1 and min_p 0 cut nothing.

    repetition_penalty: of tokens that stand in the prompt or the response; 1 is none. stop: texts that end a response,
    which keeps them.
    """

    temperature: Annotated[float, Field(ge=0), AfterValidator(_temperature)] = 1.0
    top_k: Count = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Above = 1.0
    stop_at_eos: bool = True
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)] = ()


class RewardLimits(Closed):
    """Processes that run the reward functions of a rank: how many, the memory of each, the seconds of one call (null:
    40 % of timeout_s). on_failure: `stop` ends the run with the sample that a reward failed on, `zero` scores it 0,
    `drop` leaves it out: it has no part in the loss nor in the statistics of its group and batch. An evaluation counts
    it 0."""

    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    memory_gib: Annotated[float, Field(ge=0.1, le=2**20)] = 8.0
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    on_failure: Literal["stop", "zero", "drop"] = "stop"


class Reference(Closed):
    """When the frozen reference follows the policy: after every `every`-th iteration (0: never) its weights become
    mix x the actor's + (1 - mix) x its own (Gorbatovski et al. 2024; TRL's sync_ref_model)."""

    every: Count = 0
    mix: Annotated[float, Field(gt=0, le=1)] = 0.6


class Checkpoints(Closed):
    """When the whole state of a run is written: after every `every`-th iteration and the last one (0: never). The
    newest `keep` stay. `folder`: `checkpoints` in the output where it is empty."""

    every: Count = 10
    keep: Positive = 2
    folder: str = ""


class Evaluation(Closed):
    """When responses to prompts that training never sees are scored: before the first iteration, after every `every`-th
    and after the last (0: never), each prompt once, by the likeliest tokens, with the rewards of the run.

    source: a file or folder of prompts with the columns of `data`; or held_out: so many prompts of `data`, drawn by the
    seed. keep_best: the trained model of the best mean score stays as a Hugging Face folder, `best` in the output.
    """

    every: Count = 0
    source: str = ""
    held_out: Count = 0
    keep_best: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Evaluation:
        if self.every and bool(self.source) == bool(self.held_out):
            raise PydanticCustomError(
                REFUSED, "it needs prompts of its own: `source`, or `held_out` of `data`", {"hint": "held_out: 64"}
            )
        return self


class RunFile(Closed):
    """Everything a run needs beside the plan. Relative paths are relative to the run file.

    weights: one folder for every role, or role -> folder; `random` initialises (benchmarks). A role without an entry
    starts from the actor's folder. reward: `module:function`, `file.py:function`, one of the built-in `math`, `exact`,
    `format`, `code`, `vader`, or several with their weights; unused where the graph's reward is a model. actor: the
    optimizer of every trained role but the critic. timeout_s bounds every collective; 0: as long as the plan's estimate
    asks for (`patience_s`). on_nonfinite: what happens to an optimizer step whose loss or gradient norm is no finite
    number: `stop` the run, `skip` the step, or `rollback`: it goes back to its newest checkpoint, and on from there
    with the data after the batch that it failed on. kl_bound: it goes back likewise where the mean KL to the reference
    of an iteration (`actor/reward_kl_penalty`) is beyond it, to a checkpoint from before that. rollbacks: how often at
    most. skip_batches: batches of the data that are left out so far; checkpoints keep it. samples: how many of each
    iteration's samples go to `samples.jsonl` as texts. report: draw the page of the run at its end (`realplan report
    FOLDER` does it at any time). trackers: packages that get the metrics too, where they are installed. restarts: how
    often a run that fails is started again from its newest checkpoint.
    on_loss: what a restart does where devices of the plan are gone, `stop` or `replan` for those that are left.
    resume_from: a checkpoint, a folder of them, or the output of a run, whose newest usable one is taken up.
    """

    weights: str | dict[str, str] = ""
    tokenizer: str = ""
    data: Data = Data()
    reward: str | Annotated[dict[str, float], Field(min_length=1)] = ""
    reward_limits: RewardLimits = RewardLimits()
    sampling: RunSampling = RunSampling()
    actor: Optimizer = Optimizer()
    critic: Optimizer = Optimizer(lr=5e-6)
    ppo: Ppo = Ppo()
    dpo: Dpo = Dpo()
    reference: Reference = Reference()
    iterations: Positive = 10
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    output: str = "runs/latest"
    export: bool = True
    samples: Count = 4
    report: bool = True
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], Field(strict=False)] = ()
    timeout_s: Annotated[float, Field(ge=0, le=1e7)] = 0.0
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    kl_bound: Above | None = None
    rollbacks: Count = 3
    skip_batches: Count = 0
    checkpoint: Checkpoints = Checkpoints()
    evaluation: Evaluation = Evaluation()
    restarts: Annotated[int, Field(ge=0, le=10**6)] = 0
    on_loss: Literal["stop", "replan"] = "stop"
    resume_from: str = ""
    workload: RunWorkload = RunWorkload()

    @model_validator(mode="after")
    def _checkpoints_to_go_back_to(self) -> RunFile:
        key = "on_nonfinite: rollback" if self.on_nonfinite == "rollback" else "kl_bound"
        if self.rolls_back and not self.checkpoint.every:
            raise PydanticCustomError(REFUSED, f"{key} needs checkpoints", {"hint": "checkpoint.every=10"})
        if self.kl_bound is not None and self.checkpoint.keep < 2:  # the newest may be the one that is beyond it
            raise PydanticCustomError(REFUSED, "kl_bound needs two checkpoints", {"hint": "checkpoint.keep=2"})
        return self

    @property
    def rolls_back(self) -> bool:
        """Whether the run may go back to an earlier checkpoint."""
        return self.on_nonfinite == "rollback" or self.kl_bound is not None

    @property
    def checkpoint_folder(self) -> Path:
        """Where checkpoints go."""
        return Path(self.checkpoint.folder or Path(self.output) / CHECKPOINTS)

    @property
    def rewards(self) -> dict[str, float]:
        """Reward functions and their weights."""
        if isinstance(self.reward, str):
            return {self.reward: 1.0} if self.reward else {}
        return self.reward

    def weights_of(self, role: str) -> str:
        """Folder of a role's weights, `random`, or empty when the file names none."""
        return weights_of(self.weights, role)


def weights_of(weights: str | Mapping[str, str], role: str) -> str:
    """What a role's weights are read from, by the key `weights` of a run file."""
    return weights if isinstance(weights, str) else weights.get(role, weights.get("actor", ""))


def load_run(path: Path | None, overrides: Sequence[str] = ()) -> RunFile:
    """Read a run file (None: all defaults) and apply `key=value` overrides; relative paths become absolute.

    Raises RunFileError with every problem of keys and values, located in the file or at the override.
    """
    document = _read(path) if path is not None else Yaml({}, None)
    data = {} if document.data is None else document.data
    if not isinstance(data, dict):
        problem = Problem("value", "a run file is a mapping of keys to values", "iterations: 10", (), 1, 1)
        refuse(RunFileError, path or "", [problem])
    changed = copy.deepcopy(data)
    for override in overrides:
        _apply(changed, override)
    problems = _problems(changed)
    for problem in problems:
        if override := _origin(problem, data, overrides):
            raise RunFileError(f"`{shortened(override)}`: {problem.message}", problem.hint)
    if problems:
        refuse(RunFileError, path or "the defaults", document.locate(problems))
    return _absolute(RunFile.model_validate(changed), path.parent.resolve() if path else Path.cwd())


def _problems(data: dict[str, Any]) -> list[Problem]:
    try:
        RunFile.model_validate(data)
    except ValidationError as error:
        return shape_problems(RunFile, data, error, "the run file")
    return []


def _origin(problem: Problem, data: dict[str, Any], overrides: Sequence[str]) -> str:
    """The first override with which the data has a problem: of a rule that joins several keys the one that breaks it.
    Empty where the data has it without them."""
    data = copy.deepcopy(data)
    for override in ("", *overrides):
        if override:
            _apply(data, override)
        if any((found.path, found.message) == (problem.path, problem.message) for found in _problems(data)):
            return override
    raise AssertionError(f"all overrides together have {problem}")


def _read(path: Path) -> Yaml:
    hint = "see plans/library/experiments for run files"
    try:
        return parse_yaml(read_text(path, RunFileError, "run file", hint, MOST_YAML_BYTES))
    except BadText as error:
        refuse(RunFileError, path, [error.problem])


def _apply(data: dict[str, Any], override: str) -> None:
    """Set a key."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RunFileError(f"`{shortened(override)}` is not of the form key=value", "for example `iterations=3`")
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise RunFileError(f"`{shortened(override)}`: `{parent}` holds a value, not keys", f"{parent}=VALUE")
    try:
        node[last] = parse_yaml(value).data
    except BadText:
        node[last] = value


def _absolute(run: RunFile, base: Path) -> RunFile:
    def place(value: str) -> str:
        try:
            return str(base / value) if value and value != RANDOM and os.path.exists(base / value) else value
        except (OSError, ValueError):  # too long, or no name of a file: whoever opens it says so
            return value

    weights = run.weights
    found = place(weights) if isinstance(weights, str) else {role: place(path) for role, path in weights.items()}
    parts = tuple(part.model_copy(update={"path": place(part.path)}) for part in run.data.parts)
    source = place(run.data.source) if isinstance(run.data.source, str) else parts
    data = run.data.model_copy(update={"source": source})
    models = {role: place(name) for role, name in run.workload.models.items()}
    workload = run.workload.model_copy(update={"models": models})

    def function(name: str) -> str:
        file, colon, attribute = name.partition(":")
        return place(file) + colon + attribute

    reward: str | dict[str, float]
    if isinstance(run.reward, str):
        reward = function(run.reward)
    else:
        reward = {function(name): weight for name, weight in run.reward.items()}
    update: dict[str, Any] = {
        "weights": found,
        "data": data,
        "tokenizer": place(run.tokenizer),
        "workload": workload,
        "reward": reward,
    }
    update |= {"resume_from": place(run.resume_from)}
    update |= {"evaluation": run.evaluation.model_copy(update={"source": place(run.evaluation.source)})}
    return run.model_copy(update=update)


def patience_s(plan: ExecutionPlan, run: RunFile) -> float:
    """How long a rank waits for another one before the run is given up: `timeout_s`, or three predicted iterations.

    A rank may have to wait for calls on other meshes for most of an iteration, and the first one is slower than the
    rest.
    """
    return run.timeout_s or max(LEAST_PATIENCE_S, 3.0 * plan.estimate.latency_s if plan.estimate else 0.0)
