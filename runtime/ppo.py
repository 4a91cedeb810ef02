"""PPO as tensor functions (Schulman et al. 2017) with a KL penalty in the reward (Ouyang et al. 2022).

Everything here is [n, R]: n samples of R response tokens, `mask` True at real response tokens. Sums run over real
tokens and are divided by counts of the whole minibatch or batch, so that no number depends on how samples are spread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def response_mask(lengths: Tensor, tokens: int) -> Tensor:
    """Mask [n, tokens] of responses of the given lengths [n]."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coefficient: float, clip: float
) -> Tensor:
    """Rewards [n, R]: -kl_coefficient (log p - log p_ref) at every token, plus the clipped score [n] at the last."""
    rewards = -kl_coefficient * (logprobs - ref_logprobs) * mask
    last = mask.sum(1) - 1
    rows = (last >= 0).nonzero().squeeze(1)
    rewards[rows, last[rows]] += scores[rows].clamp(-clip, clip)
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantages [n, R] (Schulman et al. 2016, eq. 16); the value after the last token is 0.

    values[:, t] is the critic's prediction before token t.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * gae_lambda * following) * mask[:, t]
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages


def whiten(values: Tensor, mask: Tensor, mean: float, variance: float) -> Tensor:
    """Shift to mean 0 and scale to variance 1, given those of the whole batch."""
    scale: float = (variance + 1e-8) ** -0.5
    return (values - mean) * scale * mask


def sample_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Per sample: count, sum and sum of squares over real tokens, float64 [n, 3]."""
    exact = values.double() * mask
    return torch.stack([mask.sum(1).double(), exact.sum(1), (exact * exact).sum(1)], dim=1)


def gather_samples(own: Tensor, rows: Tensor, samples: int, group: Any) -> Tensor:
    """Per-sample numbers of the whole batch [samples, k] from those of this dp rank [n, k].

    Each number is added to zeros only, so that the result is exact and the same under every layout.
    """
    whole = own.new_zeros(samples, own.shape[1])
    whole[rows] = own
    if group.size() > 1:
        dist.all_reduce(whole, group=group)
    return whole


def moments(sums: Tensor) -> tuple[float, float]:
    """Mean and variance over all tokens, from `sample_sums` of all samples."""
    count, total, squares = sums.sum(0).tolist()
    mean = total / max(count, 1.0)
    return mean, max(squares / max(count, 1.0) - mean * mean, 0.0)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float, tokens: float
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The clipped objective, summed over real tokens and divided by `tokens`, and terms that add up likewise."""
    difference = (logprobs - old_logprobs) * mask
    ratio = difference.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = (torch.maximum(plain, clipped) * mask).sum() / tokens
    terms = {
        "pg_loss": loss,
        "ppo_kl": -difference.sum() / tokens,
        "pg_clipfrac": ((clipped > plain) & mask).sum() / tokens,
    }
    return loss, terms


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float, tokens: float
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Half the squared error, the larger of plain and clipped around the old values; normalised as `policy_loss`."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    plain, clipped = (values - returns).square(), (near - returns).square()
    loss = 0.5 * (torch.maximum(plain, clipped) * mask).sum() / tokens
    terms = {
        "vf_loss": loss,
        "vf_clipfrac": ((clipped > plain) & mask).sum() / tokens,
        "vpred_mean": (values * mask).sum() / tokens,
    }
    return loss, terms
