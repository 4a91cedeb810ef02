"""REINFORCE with a baseline that needs neither a critic nor a group: REINFORCE++ and ReMax."""

from __future__ import annotations

from plans.hyperparameters import Ppo
from runtime.algorithms.samples import Samples, Signal, clipped, discounted, token_rewards, whiten


def reinforce_pp(samples: Samples, settings: Ppo) -> Signal:
    """REINFORCE++ (Hu 2025): the rewards that follow a token, KL penalty included, normalised over the batch."""
    rewards = token_rewards(samples, settings, "reward")
    returns = discounted(rewards, settings.gamma) * samples.mask
    return Signal(rewards=rewards, advantages=whiten(samples, returns), returns=returns)


def remax(samples: Samples, settings: Ppo) -> Signal:
    """ReMax (Li et al. 2024, algorithm 1): the rewards that follow a token against the score of the greedy response to
    the same prompt."""
    assert samples.greedy_scores is not None
    rewards = token_rewards(samples, settings, "reward")
    returns = discounted(rewards, settings.gamma) * samples.mask
    baseline = clipped(samples.greedy_scores, settings.reward_clip)[:, None]
    return Signal(rewards=rewards, advantages=(returns - baseline) * samples.mask, returns=returns)
