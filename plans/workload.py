"""Workload: which algorithm on which models with which batch; the arithmetic of batch words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from plans.errors import SpecError
from plans.graph import CallKind, DataflowGraph
from plans.model import ModelSpec
from plans.problems import shortened

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
    "mean_response_tokens": (0, MOST_TOKENS),
    "minibatches": (1, MOST_SAMPLES),
}
"""Least and most of every size of a workload."""


def role_spec(role: str, spec: ModelSpec) -> ModelSpec:
    """The architecture that a role runs: a critic's or a reward model's with a value head."""
    return spec.with_value_head() if role in VALUE_ROLES else spec


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One iteration's work.

    batch_size: prompts per iteration. group_size: samples per prompt. minibatches: optimizer steps per iteration.
    prompt_tokens, response_tokens: the longest prompt and response, tokens. mean_response_tokens: the mean of the
    response length distribution (0: every response reaches response_tokens). models: role -> architecture.
    """

    graph: DataflowGraph
    models: Mapping[str, ModelSpec] = field(hash=False)
    batch_size: int = 512
    group_size: int = 1
    prompt_tokens: int = 1024
    response_tokens: int = 1024
    mean_response_tokens: int = 0
    minibatches: int = 4
    dtype: str = "bf16"

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
        if self.mean_response_tokens > self.response_tokens:
            raise SpecError(
                f"workload: mean_response_tokens {self.mean_response_tokens} is above response_tokens"
                f" {self.response_tokens}, the longest response",
                f"mean_response_tokens {self.response_tokens} or less, or a larger response_tokens",
            )

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
