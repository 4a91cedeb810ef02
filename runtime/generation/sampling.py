"""Choosing tokens so that the layout does not matter.

The random number of a vocabulary entry is a hash of (seed, iteration, sample, position, token id): no generator has a
state, so every layout, split of the batch and place in it draws the same numbers. The token is the argument of the
maximum of log-probability + Gumbel noise, which small differences of the logits rarely change (an inverse-CDF draw
would follow the rounding of every partial sum), and which tensor-parallel ranks find in their part of the vocabulary.

Everything here has static shapes and never waits for the device, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plans.errors import RealplanError

_LOWEST = torch.finfo(torch.float32).min
_POSITIVE = 0x7FFF_FFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose tokens. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep the whole vocabulary.

    min_p cuts tokens less probable than min_p times the most probable one. repetition_penalty divides positive logits
    of tokens that stand in the prompt or the response, and multiplies negative ones (Keskar et al. 2019); 1 is none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise RealplanError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise RealplanError(f"top_k is {self.top_k}; it must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise RealplanError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise RealplanError(f"min_p is {self.min_p}; it must lie in [0, 1]")
        if not self.repetition_penalty > 0:
            raise RealplanError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1 is none)")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0

    @property
    def truncated(self) -> bool:
        """Whether a part of the vocabulary is cut off, for which a rank needs to see the whole of it."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalised(self) -> bool:
        """Whether tokens that have been seen count less."""
        return self.repetition_penalty != 1


def sample_keys(seed: int, iteration: int, sample_ids: Tensor) -> Tensor:
    """One 64-bit key [n] per sample; `sample_ids` [n] int64 are global sample numbers."""
    root = _mix(torch.tensor(seed, device=sample_ids.device)) + iteration
    return _mix(_mix(root) + sample_ids)


def step_seeds(keys: Tensor, positions: Tensor) -> Tensor:
    """What tells the random numbers of one response position from those of another: int32 [2, ...].

    keys: those of the samples; positions: response positions from 0; int64 of one shape.
    """
    row = _mix(keys + positions)
    return torch.stack([_mix(row ^ 1), _mix(row ^ 2) | 1]).to(torch.int32)


def id_hashes(first: int, size: int, device: torch.device) -> Tensor:
    """Hashes of the token ids `first` .. `first + size`: int32 [size]."""
    return _mix(torch.arange(first, first + size, device=device)).to(torch.int32)


def mark_seen(seen: Tensor, tokens: Tensor, first: int) -> None:
    """Note tokens [n] in `seen` [n, size], of which column 0 is token id `first`; others are left out."""
    local = tokens - first
    inside = (local >= 0) & (local < seen.shape[-1])
    seen.scatter_reduce_(1, local.clamp(0, seen.shape[-1] - 1)[:, None], inside[:, None].to(seen.dtype), "amax")


class Chooser:
    """Chooses tokens from this rank's part of the logits; every rank of the tp group gets the same ones.

    `part`: entries of the vocabulary that a rank holds, the padding included; ids from `vocab` on are padding and never
    chosen.
    """

    def __init__(self, sampling: Sampling, vocab: int, part: int, group: Any, device: torch.device) -> None:
        self.sampling = sampling
        self.first = group.rank() * part
        self.size = max(0, min(part, vocab - self.first))
        self._part, self._vocab, self._group = part, vocab, group
        # With a truncated vocabulary every rank looks at the whole of it, so that no second exchange is needed.
        self._whole = sampling.truncated and group.size() > 1
        self._alone = group.size() == 1 or self._whole
        begin, size = (0, vocab) if self._whole else (self.first, max(1, self.size))
        self._hashes = id_hashes(begin, size, device)

    def __call__(self, logits: Tensor, seeds: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [n] int64 and their log-probabilities [n] float32.

        logits: [n, part], which may be overwritten; seeds: [2, n] of `step_seeds`; seen: [n, part], 1 where a token has
        been seen, for the repetition penalty. The log-probability is that of the softmax of the model's logits over the
        whole vocabulary at the sampling temperature (at 1 when greedy): what training computes again.
        """
        plain = self._scaled(logits)
        judged = plain if seen is None else self._penalised(plain, seen)
        if self._whole:
            plain = self._gathered(plain)
            judged = plain if seen is None else self._gathered(judged)
        top = plain.amax(-1, keepdim=True)
        weights = (plain - top).exp_()
        total = weights.sum(-1).log().add(top.squeeze(-1))
        if seen is not None:
            top = judged.amax(-1, keepdim=True)
            weights = (judged - top).exp_()
        local, score = self._best(judged, top, weights, seeds)
        logit = plain.gather(-1, local).squeeze(-1)
        if self._alone:
            return local.squeeze(-1), logit - total
        token = (local + self.first).squeeze(-1).float()  # exact: ids are below 2^24
        return self._agree(torch.stack([score.squeeze(-1), token, logit, total], -1))

    def _scaled(self, logits: Tensor) -> Tensor:
        """Logits at the temperature, without padding; one impossible token where a part is all padding."""
        plain = logits[:, : max(1, self.size)]
        if plain.dtype is not torch.float32:
            plain = plain.float()
        if not self.size:
            return plain.fill_(_LOWEST)
        return plain if self.sampling.temperature in (0, 1) else plain / self.sampling.temperature

    def _penalised(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Logits with the repetition penalty, which may come after the temperature because both are factors."""
        penalty = self.sampling.repetition_penalty
        worse = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(seen[:, : logits.shape[-1]] > 0, worse, logits)

    def _gathered(self, part: Tensor) -> Tensor:
        """[n, size] of every rank as [n, vocabulary]."""
        padded = torch.nn.functional.pad(part, (0, self._part - part.shape[-1]))
        return self._of_all(padded).transpose(0, 1).flatten(1)[:, : self._vocab]

    def _of_all(self, own: Tensor) -> Tensor:
        """[n, k] of every rank as [ranks, n, k]."""
        ranks = self._group.size()
        whole = own.new_empty(ranks * own.shape[0], own.shape[1])
        dist.all_gather_into_tensor(whole, own, group=self._group)
        return whole.view(ranks, *own.shape)

    def _best(self, judged: Tensor, top: Tensor, weights: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """The best entry of a part: its place [n, 1] and score [n, 1]. `weights` are exp(judged - top), overwritten;
        where one part is all there is, nobody compares scores."""
        if self.sampling.greedy:
            score, local = judged.max(-1, keepdim=True)
            return local, score
        if self.sampling.truncated:
            weights = _truncate(weights, self.sampling)
        # The maximum of logit + Gumbel is that of weight / Exponential, which takes one logarithm less.
        ratio, local = weights.div_(log_uniforms(self._hashes, seeds)).min(-1, keepdim=True)
        return local, ratio if self._alone else ratio.neg_().log_().add_(top)

    def _agree(self, best: Tensor) -> tuple[Tensor, Tensor]:
        """Token and log-probability out of every rank's best entry [n, 4]: score, token, logit, log of the sum."""
        parts = self._of_all(best)
        part = parts[..., 0].argmax(0)
        chosen = parts.gather(0, part[None, :, None].expand(1, -1, 4))[0]
        return chosen[:, 1].long(), chosen[:, 2] - parts[..., 3].logsumexp(0)


def _truncate(weights: Tensor, sampling: Sampling) -> Tensor:
    """Zero what top-k, then top-p of what top-k left, then min-p cut off; the heaviest entry always stays."""
    if 0 < sampling.top_k < weights.shape[-1]:
        least = weights.topk(sampling.top_k).values[:, -1:]
        weights = weights.masked_fill(weights < least, 0)
    if sampling.top_p < 1:
        ordered, places = weights.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        cut = before >= sampling.top_p * ordered.sum(-1, keepdim=True)
        cut[:, 0].fill_(False)
        weights = weights.scatter(-1, places, ordered.masked_fill(cut, 0))
    if sampling.min_p > 0:
        weights = weights.masked_fill(weights < sampling.min_p, 0)  # the heaviest weight is one
    return weights


def log_uniforms(hashes: Tensor, seeds: Tensor) -> Tensor:
    """Logarithms of uniform numbers [n, size], float32, for the hashed ids of a part and the seeds [2, n] of n rows.

    A row is a multiplicative hash, with a multiplier and a mask of its own, of the ids' own hash. The numbers near one
    decide; as 1 - v they keep their precision. The half keeps the least v above zero: a token less probable than 2^-32
    is never drawn.
    """
    mask, multiplier = seeds[0, :, None], seeds[1, :, None]
    bits = (hashes ^ mask).mul_(multiplier).bitwise_and_(_POSITIVE)
    return bits.add(0.5).mul_(-(2.0**-31)).log1p_()


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
