"""PPO (Schulman et al. 2017) with a critic and a KL penalty in the reward (Ouyang et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from plans.hyperparameters import Ppo
from runtime.algorithms.samples import Samples, Signal, token_rewards, whiten


def ppo(samples: Samples, settings: Ppo) -> Signal:
    """Generalised advantages of the critic's values, whitened over the batch; returns before the whitening."""
    assert samples.values is not None
    rewards = token_rewards(samples, settings, "reward")
    advantages = gae(rewards, samples.values, samples.mask, settings.gamma, settings.gae_lambda)
    returns = advantages + samples.values * samples.mask
    if settings.whiten_advantages:
        advantages = whiten(samples, advantages)
    return Signal(rewards=rewards, advantages=advantages, returns=returns)


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
