"""Baselines from the other responses to the same prompt: GRPO and RLOO. No critic."""

from __future__ import annotations

from torch import Tensor

from plans.runfile import Ppo
from runtime.algorithms.samples import Samples, Signal, token_rewards

STD_EPS = 1e-6
ROUNDING = 1e-6
"""Part of a group's largest score below which its spread is rounding: rewards are float32."""


def grpo(samples: Samples, settings: Ppo) -> Signal:
    """GRPO (Shao et al. 2024, section 4.1.2): the score's distance to the group's mean in standard deviations, at every
    token. The standard deviation divides by group size - 1, as those of verl and TRL do. A group without spread says
    nothing about its responses: its advantages are zero, and not the rounding of its mean made large. Without
    `divide_by_deviation` the distance itself (Dr. GRPO: Liu et al. 2025, eq. 3)."""
    rewards = token_rewards(samples, settings, "loss")
    scores = _groups(samples, rewards)
    distance = scores - scores.mean(1, keepdim=True)
    if settings.divide_by_deviation:
        distance = distance / (scores.std(1, keepdim=True) + STD_EPS)
    return _signal(samples, rewards, distance.masked_fill(_flat(scores), 0.0))


def rloo(samples: Samples, settings: Ppo) -> Signal:
    """RLOO (Ahmadian et al. 2024, eq. 8): the reward of a response, less its KL penalty, against the mean of the
    group's other responses, at every token."""
    rewards = token_rewards(samples, settings, "reward")
    totals = _groups(samples, rewards)
    others = (totals.sum(1, keepdim=True) - totals) / (samples.group_size - 1)
    return _signal(samples, rewards, totals - others)


def spread(samples: Samples) -> Tensor:
    """Whether the scores of a sample's group differ, for every sample of the batch [batch]. Collective like signals."""
    scores = samples.gather(samples.scores.double()[:, None]).view(-1, samples.group_size)
    return (~_flat(scores)).expand(-1, samples.group_size).flatten()


def _flat(scores: Tensor) -> Tensor:
    """Groups whose scores [prompts, group size] are equal but for rounding: bool [prompts, 1]."""
    width = scores.amax(1, keepdim=True) - scores.amin(1, keepdim=True)
    return width <= ROUNDING * scores.abs().amax(1, keepdim=True)


def _groups(samples: Samples, rewards: Tensor) -> Tensor:
    """The reward of every response of the batch, one row per prompt, float64 [prompts, group size]."""
    return samples.gather(rewards.double().sum(1, keepdim=True)).view(-1, samples.group_size)


def _signal(samples: Samples, rewards: Tensor, advantages: Tensor) -> Signal:
    """The signal of advantages [prompts, group size] that hold for whole responses."""
    own = advantages.view(-1, 1)[samples.rows].to(rewards.dtype) * samples.mask
    return Signal(rewards=rewards, advantages=own, returns=own)
