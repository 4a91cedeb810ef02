"""Choosing tokens so that the layout does not matter.

The random number of a vocabulary entry is a hash of (seed, iteration, sample, position, token id): no generator has a
state, so every layout, split of the batch and removal of finished rows draws the same numbers. The token is the
argument of the maximum of log-probability + Gumbel noise, which small differences of the logits rarely change (an
inverse-CDF draw would follow the rounding of every partial sum), and which tensor-parallel ranks find in their part of
the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plans.errors import RealplanError

_LOWEST = torch.finfo(torch.float32).min
_POSITIVE = 0x7FFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose tokens. temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise RealplanError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise RealplanError(f"top_k is {self.top_k}; it must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise RealplanError(f"top_p is {self.top_p}; it must lie in (0, 1]")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0

    @property
    def truncated(self) -> bool:
        """Whether a part of the vocabulary is cut off."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1)


def sample_keys(seed: int, iteration: int, sample_ids: Tensor) -> Tensor:
    """One 64-bit key [n] per sample; `sample_ids` [n] int64 are global sample numbers."""
    root = _mix(torch.tensor(seed, device=sample_ids.device)) + iteration
    return _mix(_mix(root) + sample_ids)


def choose_tokens(
    logits: Tensor, keys: Tensor, position: int, sampling: Sampling, vocab: int, tp_group: Any
) -> tuple[Tensor, Tensor]:
    """Tokens [n] int64 and their log-probabilities [n] float64, equal on all ranks of `tp_group`.

    `logits` [n, padded vocabulary / tp] is this rank's part and may be overwritten; ids from `vocab` on are padding and
    never chosen. `position` counts response tokens. The log-probability is that of the softmax over the whole
    vocabulary at the sampling temperature (at 1 when greedy), before top-k and top-p.
    """
    logits = logits.float()
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    first = tp_group.rank() * logits.shape[-1]
    logits[:, max(0, vocab - first) :] = -torch.inf
    parts = tp_group.size()
    if parts > 1 and sampling.truncated:
        logits, first, parts = _gather(logits, tp_group).transpose(0, 1).flatten(1), 0, 1
    best = _best(logits, keys, position, sampling, first)
    return _winner(_gather(best, tp_group) if parts > 1 else best[None])


def _gather(part: Tensor, group: Any) -> Tensor:
    """[n, k] of every rank as [ranks, n, k]."""
    whole = part.new_empty(group.size() * part.shape[0], part.shape[1])
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole.view(group.size(), *part.shape)


def _best(logits: Tensor, keys: Tensor, position: int, sampling: Sampling, first: int) -> Tensor:
    """The best entry of a part of the vocabulary: [n, 4] float64 of score, token, its logit, log of the sum of exp."""
    top = logits.amax(-1, keepdim=True).clamp(min=_LOWEST)
    weights = (logits - top).exp_()
    total = top.squeeze(-1).double() + weights.sum(-1).double().log()
    if sampling.greedy:
        local = logits.argmax(-1, keepdim=True)
        score = logits.gather(-1, local)
    else:
        if sampling.truncated:
            weights = _truncate(weights, sampling)
        # The maximum of logit + Gumbel is that of weight / Exponential, which takes one logarithm less.
        noise = _log_uniforms(keys, position, first, logits.shape[-1])
        local = (weights / noise).argmin(-1, keepdim=True)
        score = logits.gather(-1, local) - (-noise.gather(-1, local)).log()
    logit = logits.gather(-1, local)
    return torch.cat([score.double(), (local + first).double(), logit.double(), total[:, None]], dim=-1)


def _winner(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Token and log-probability out of the best entries [parts, n, 4] of all parts."""
    score, token, logit, total = parts.unbind(-1)
    part = score.argmax(0, keepdim=True)
    return token.gather(0, part)[0].long(), logit.gather(0, part)[0] - total.logsumexp(0)


def _truncate(weights: Tensor, sampling: Sampling) -> Tensor:
    """Zero what top-k and then top-p (of what top-k left) cut off; the heaviest entry always stays."""
    if 0 < sampling.top_k < weights.shape[-1]:
        least = weights.topk(sampling.top_k).values[:, -1:]
        weights = weights.masked_fill(weights < least, 0)
    if sampling.top_p < 1:
        ordered, places = weights.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        cut = before >= sampling.top_p * ordered.sum(-1, keepdim=True)
        cut[:, 0] = False
        weights = weights.scatter(-1, places, ordered.masked_fill(cut, 0))
    return weights


def _log_uniforms(keys: Tensor, position: int, first: int, size: int) -> Tensor:
    """Logarithms of uniform numbers [n, size] for token ids `first` .. `first + size`, float32.

    A row is a multiplicative hash, with a multiplier and a mask of its own, of the ids' own hash. The numbers near one
    decide; as 1 - v they keep their precision.
    """
    ids = _mix(torch.arange(first, first + size, device=keys.device))
    row = _mix(keys + position)
    mask, multiplier = _mix(row ^ 1), _mix(row ^ 2) | 1
    bits = (ids ^ mask[:, None]).mul_(multiplier[:, None]).bitwise_and_(_POSITIVE)
    return bits.float().mul_(-(2.0**-63)).log1p_()


def _mix(x: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) on int64, which wraps as uint64 does."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
