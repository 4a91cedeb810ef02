"""Workload: which algorithm on which models with which batch; the arithmetic of batch words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from plans.errors import SpecError
from plans.graph import CallKind, DataflowGraph
from plans.lengths import Lengths, Percentiles, percentiles_of
from plans.lora import LORA_ROLE, Lora
from plans.model import ModelSpec
from plans.problems import shortened
from plans.routes import check_routes

VALUE_ROLES = ("critic", "reward")
"""Roles whose models give one scalar per token, in place of a vocabulary."""
DTYPE_BYTES: Mapping[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
MOST_TOKENS = 10**7
"""Ceiling of a prompt and of a response: beyond any model's context, and still quick to reckon with."""
MOST_SAMPLES = 10**6
"""Ceiling of the samples of an iteration; who holds which row is kept row by row."""
SIZES: Mapping[str, tuple[int, int]] = {
    "batch_size": (1, MOST_SAMPLES),
    "group_size": (1, MOST_SAMPLES),
    "prompt_tokens": (1, MOST_TOKENS),
    "response_tokens": (0, MOST_TOKENS),
    "mean_prompt_tokens": (0, MOST_TOKENS),
    "mean_response_tokens": (0, MOST_TOKENS),
    "minibatches": (1, MOST_SAMPLES),
}
"""Least and most of every size of a workload."""


def role_spec(role: str, spec: ModelSpec) -> ModelSpec:
    """The architecture that a role runs: a critic's or a reward model's with a value head."""
    return spec.with_value_head() if role in VALUE_ROLES else spec


def with_lora(graph: DataflowGraph, models: Mapping[str, ModelSpec], lora: Lora | None) -> dict[str, ModelSpec]:
    """The models of a workload whose actor is trained through adapters; unchanged without. Raises SpecError where no
    actor is trained."""
    if lora is None:
        return dict(models)
    if LORA_ROLE not in graph.trainers:
        raise SpecError(
            f"lora: `{graph.name}` trains no `{LORA_ROLE}`; only its language model can have adapters",
            "leave lora out, or an algorithm that trains one",
        )
    return {**models, LORA_ROLE: replace(models[LORA_ROLE], lora=lora)}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One iteration's work.

    batch_size: prompts per iteration. group_size: samples per prompt. minibatches: optimizer steps per iteration.
    prompt_tokens, response_tokens: the longest prompt and response, tokens. How long they are: mean_prompt_tokens,
    mean_response_tokens (0: not given), or the percentiles prompt_lengths, response_lengths; with neither all reach the
    maximum. `prompts` and `responses` are the distributions that follow. models: role -> architecture, the actor's with
    its adapters (`with_lora`).
    allow_long: samples may be longer than a model's context (`plans.checks.sample_problems`).
    """

    graph: DataflowGraph
    models: Mapping[str, ModelSpec] = field(hash=False)
    batch_size: int = 512
    group_size: int = 1
    prompt_tokens: int = 1024
    response_tokens: int = 1024
    mean_prompt_tokens: int = 0
    mean_response_tokens: int = 0
    prompt_lengths: Percentiles = ()
    response_lengths: Percentiles = ()
    minibatches: int = 4
    dtype: str = "bf16"
    allow_long: bool = False

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.dtype not in DTYPE_BYTES:
            raise SpecError(f"workload: dtype `{self.dtype}` is unknown", f"one of {', '.join(DTYPE_BYTES)}")
        if self.samples % self.minibatches:
            raise SpecError(
                f"workload: {self.samples} samples (batch_size {self.batch_size} x group_size {self.group_size}) do not"
                f" divide into {self.minibatches} minibatches",
                f"minibatches one of {[m for m in range(1, 17) if self.samples % m == 0]}",
            )
        missing = [role for role in self.graph.roles if role not in self.models]
        if missing:
            raise SpecError(f"workload: no model for role `{missing[0]}` of graph `{self.graph.name}`")
        check_routes(self.graph, self.models)

    def with_lengths(self, found: Mapping[str, Any]) -> Workload:
        """The same work on samples of other lengths, in the keys of a run file (`plans.lengthsfile.lengths_file`)."""
        parts = [part for part in ("prompt", "response") if {f"{part}_lengths", f"mean_{part}_tokens"} & set(found)]
        update: dict[str, Any] = {}
        for part in parts:
            update[f"mean_{part}_tokens"] = found.get(f"mean_{part}_tokens", 0)
            update[f"{part}_lengths"] = percentiles_of(found.get(f"{part}_lengths", {}))
        return replace(self, **update)

    def _check_sizes(self) -> None:
        for name, (least, most) in SIZES.items():
            value = getattr(self, name)
            if not least <= value <= most:
                rule = f"it must be at least {least}" if value < least else f"it can be at most {most:,}"
                raise SpecError(
                    f"workload: {name} is {shortened(value)}; {rule}",
                    f"{name} {max(least, min(value, most))}, for example",
                )
        if self.samples > MOST_SAMPLES:
            raise SpecError(
                f"workload: batch_size {self.batch_size} x group_size {self.group_size} is {self.samples:,} samples;"
                f" an iteration can have at most {MOST_SAMPLES:,}",
                f"batch_size {MOST_SAMPLES // self.group_size} or less",
            )
        for part in ("prompt", "response"):
            mean, longest = getattr(self, f"mean_{part}_tokens"), getattr(self, f"{part}_tokens")
            if mean > longest:
                raise SpecError(
                    f"workload: mean_{part}_tokens {mean} is above {part}_tokens {longest}, the longest {part}",
                    f"mean_{part}_tokens {longest} or less, or a larger {part}_tokens",
                )
            try:
                _ = getattr(self, f"{part}s")
            except SpecError as error:
                raise SpecError(f"workload: {part}_lengths: {error.message}", error.hint) from None

    @cached_property
    def prompts(self) -> Lengths:
        """How long prompts are."""
        return Lengths(self.prompt_tokens, self.mean_prompt_tokens, self.prompt_lengths)

    @cached_property
    def responses(self) -> Lengths:
        """How long responses are."""
        return Lengths(self.response_tokens, self.mean_response_tokens, self.response_lengths)

    def sample_lengths(self, seed: int = 0) -> tuple[tuple[int, int], ...]:
        """Prompt and response tokens of every sample of an iteration that stands for the distributions; the samples of
        one prompt stand side by side."""
        prompts = self.prompts.draw(self.batch_size, seed)
        responses = self.responses.draw(self.samples, seed + 1)
        return tuple((prompts[i // self.group_size], tokens) for i, tokens in enumerate(responses))

    @property
    def lora(self) -> Lora | None:
        """The actor's adapters."""
        return self.models[LORA_ROLE].lora if LORA_ROLE in self.models else None

    @property
    def samples(self) -> int:
        """Samples per iteration."""
        return self.batch_size * self.group_size

    @property
    def tokens(self) -> int:
        """Longest sample, tokens."""
        return self.prompt_tokens + self.response_tokens

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight."""
        return DTYPE_BYTES[self.dtype]

    def spec(self, call: str) -> ModelSpec:
        """Architecture that a model call runs."""
        return self.models[self.graph.call(call).model]

    def samples_per_step(self, call: str) -> int:
        """Samples that one pass of a call handles at once: a minibatch in training, else the whole batch."""
        return self.samples // self.minibatches if self.graph.call(call).kind is CallKind.TRAIN_STEP else self.samples
