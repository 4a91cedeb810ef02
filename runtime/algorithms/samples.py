"""What an algorithm learns from, what it finds, and the sums that algorithms share.

Tensors are [n] or [n, R]: n samples of this replica with R response tokens, `mask` True at real response tokens.
Statistics over the batch come from exact float64 numbers of every sample, gathered in sample order, so that no result
depends on how samples are spread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plans.hyperparameters import Ppo
from runtime.algorithms.losses import kl_estimate


@dataclass(frozen=True, kw_only=True)
class Samples:
    """This replica's samples.

    rows: their numbers [n] in the batch; sample i belongs to prompt i // group_size. old_logprobs, ref_logprobs,
    values: [n, R]; values[:, t] is the critic's prediction before token t. scores: the rewards [n];
    greedy_scores: those of the greedy responses. kept: bool [n], False where a sample has no score and no part in
    anything; its mask is False. gather: numbers of every sample [batch, k] from this replica's [n, k].
    """

    rows: Tensor
    group_size: int
    mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    scores: Tensor
    kept: Tensor
    values: Tensor | None = None
    greedy_scores: Tensor | None = None
    gather: Callable[[Tensor], Tensor]

    @property
    def kl(self) -> Tensor:
        """log p - log p_ref of each real token [n, R], whose mean is the KL to the reference."""
        return (self.old_logprobs - self.ref_logprobs) * self.mask


@dataclass(frozen=True, kw_only=True)
class Signal:
    """What an algorithm makes of samples, all [n, R] and 0 at padding."""

    rewards: Tensor
    advantages: Tensor
    returns: Tensor


Advantages = Callable[[Samples, Ppo], Signal]
"""The signal of a replica's samples; collective over its dp group."""


def response_mask(lengths: Tensor, tokens: int) -> Tensor:
    """Mask [n, tokens] of responses of the given lengths [n]."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def clipped(scores: Tensor, clip: float | None) -> Tensor:
    """Scores within [-clip, clip]; None leaves them."""
    return scores if clip is None else scores.clamp(-clip, clip)


def token_rewards(samples: Samples, settings: Ppo, kl_in: str) -> Tensor:
    """Rewards [n, R]: the clipped score at the last token, and less the KL to the reference at every token where the
    KL is in the reward. kl_in: where the algorithm has it when the user does not say."""
    rewards = torch.zeros_like(samples.old_logprobs)
    if (settings.kl_in or kl_in) == "reward":
        kl = kl_estimate(samples.old_logprobs - samples.ref_logprobs, settings.kl_estimator or "k1")
        rewards = -settings.kl_coefficient * kl * samples.mask
    last = samples.mask.sum(1) - 1
    rows = (last >= 0).nonzero().squeeze(1)
    rewards[rows, last[rows]] += clipped(samples.scores[rows], settings.reward_clip)
    return rewards


def overlong(samples: Samples, settings: Ppo, most: int) -> Samples:
    """The samples with the scores of long responses lowered (DAPO: Yu et al. 2025, eq. 13): by `overlong_penalty` times
    the share of the last `overlong_tokens` before `most` that a response has used."""
    if not settings.overlong_tokens:
        return samples
    buffer = min(settings.overlong_tokens, most)
    used = (samples.mask.sum(1) - (most - buffer)).clamp(0, buffer) / buffer
    return replace(samples, scores=samples.scores - settings.overlong_penalty * used)


def discounted(rewards: Tensor, gamma: float) -> Tensor:
    """Sums of the rewards [n, R] from each token on, discounted by gamma per token."""
    sums = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = rewards[:, t] + gamma * following
        sums[:, t] = following
    return sums


def whiten(samples: Samples, values: Tensor) -> Tensor:
    """Values [n, R] shifted to mean 0 and scaled to variance 1 over the real tokens of the whole batch."""
    mean, variance = moments(samples.gather(sample_sums(values, samples.mask)))
    scale: float = (variance + 1e-8) ** -0.5
    return (values - mean) * scale * samples.mask


def sample_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Per sample: count, sum and sum of squares over real tokens, float64 [n, 3]."""
    exact = values.double() * mask
    return torch.stack([mask.sum(1).double(), exact.sum(1), (exact * exact).sum(1)], dim=1)


def moments(sums: Tensor) -> tuple[float, float]:
    """Mean and variance over all tokens, from `sample_sums` of all samples."""
    count, total, squares = sums.sum(0).tolist()
    mean = total / max(count, 1.0)
    return mean, max(squares / max(count, 1.0) - mean * mean, 0.0)


def gather_samples(own: Tensor, rows: Tensor, samples: int, group: Any) -> Tensor:
    """Per-sample numbers of the whole batch [samples, k] from those of this dp rank [n, k].

    Each number is added to zeros only, so that the result is exact and the same under every layout.
    """
    whole = own.new_zeros(samples, own.shape[1])
    whole[rows] = own
    if group.size() > 1:
        dist.all_reduce(whole, group=group)
    return whole
