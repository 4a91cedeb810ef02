"""LoRA (Hu et al. 2021, arXiv:2106.09685): beside a frozen weight W [out, in] trains a product of two thin matrices.

A linear layer computes x W^T + (alpha / rank) x A^T B^T with A [rank, in] and B [out, rank]. B begins as zero, so that
training begins at the frozen model.
"""

from __future__ import annotations

from dataclasses import dataclass

from plans.errors import SpecError, nearest

LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""The linear layers of a block that can have adapters: query-key-value, attention output, gate-and-up, down."""
LORA_ROLE = "actor"
"""The role whose model is trained through adapters."""
MOST_RANK = 4096
MOST_ALPHA = 1e6
ADAPTERS = ("lora_a", "lora_b")
"""Last parts of the names of an adapter's parameters."""


@dataclass(frozen=True, slots=True)
class Lora:
    """Adapters of a model. rank: inner width of the product. alpha: the product counts alpha / rank; None: twice the
    rank. targets: which of `LORA_TARGETS` have one, kept in that order."""

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = LORA_TARGETS

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MOST_RANK:
            raise SpecError(f"lora: rank is {self.rank}; it must be from 1 to {MOST_RANK:,}", "rank 16, for example")
        alpha = 2.0 * self.rank if self.alpha is None else float(self.alpha)
        if not 0 < alpha <= MOST_ALPHA:
            raise SpecError(
                f"lora: alpha is {alpha:g}; it must be above 0 and at most {MOST_ALPHA:,.0f}", f"alpha {2 * self.rank}"
            )
        for target in self.targets:
            if target not in LORA_TARGETS:
                raise SpecError(f"lora: target `{target}` is unknown", nearest(target, list(LORA_TARGETS)))
        if not self.targets or len(set(self.targets)) < len(self.targets):
            what = "no targets" if not self.targets else "a target twice"
            raise SpecError(f"lora: it has {what}", f"some of {', '.join(LORA_TARGETS)}, each once")
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "targets", tuple(t for t in LORA_TARGETS if t in self.targets))

    @property
    def scale(self) -> float:
        """What the adapters' product is multiplied by."""
        assert self.alpha is not None
        return self.alpha / self.rank

    @property
    def words(self) -> str:
        """In words, for people."""
        targets = "" if self.targets == LORA_TARGETS else f" on {', '.join(self.targets)}"
        return f"LoRA of rank {self.rank}, alpha {self.alpha:g}{targets}"
