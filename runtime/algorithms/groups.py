"""Baselines from the other responses to the same prompt: GRPO and RLOO. No critic."""

from __future__ import annotations

import torch
from torch import Tensor

from plans.hyperparameters import Ppo
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
    scores, kept = _groups(samples, rewards.double().sum(1))
    count = kept.sum(1, keepdim=True)
    distance = (scores - scores.sum(1, keepdim=True) / count.clamp_min(1)) * kept
    if settings.divide_by_deviation:
        variance = distance.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)
        distance = distance / (variance.sqrt() + STD_EPS)
    return _signal(samples, rewards, distance.masked_fill(_flat(scores, kept), 0.0))


def rloo(samples: Samples, settings: Ppo) -> Signal:
    """RLOO (Ahmadian et al. 2024, eq. 8): the reward of a response, less its KL penalty, against the mean of the
    group's other responses, at every token; nothing where there is no other one."""
    rewards = token_rewards(samples, settings, "reward")
    totals, kept = _groups(samples, rewards.double().sum(1))
    count = kept.sum(1, keepdim=True)
    others = (totals.sum(1, keepdim=True) - totals) / (count - 1).clamp_min(1)
    return _signal(samples, rewards, ((totals - others) * kept).masked_fill(count < 2, 0.0))


def spread(samples: Samples) -> Tensor:
    """Whether the scores of a sample's group differ, for every sample of the batch [batch]. Collective like signals."""
    flat = _flat(*_groups(samples, samples.scores.double()))
    return (~flat).expand(-1, samples.group_size).flatten()


def first_of(counts: Tensor, group_size: int, minibatches: int, prompts: int) -> Tensor:
    """Of the samples that count, bool [batch], those of the first `prompts` groups, an equal part of them in each
    minibatch: the batch that DAPO's dynamic sampling (Yu et al. 2025, eq. 11) fills, out of a batch of candidates. A
    group counts where any of its samples does."""
    groups = counts.view(minibatches, -1, group_size)
    found = groups.any(2)
    first = found & (found.cumsum(1) <= prompts // minibatches)
    return (groups & first[..., None]).flatten()


def _flat(scores: Tensor, kept: Tensor) -> Tensor:
    """Groups whose scores [prompts, group size], of those that are kept, are equal but for rounding: bool
    [prompts, 1]."""
    inf = torch.inf
    width = scores.masked_fill(~kept, -inf).amax(1, keepdim=True) - scores.masked_fill(~kept, inf).amin(1, keepdim=True)
    return width <= ROUNDING * scores.abs().amax(1, keepdim=True)


def _groups(samples: Samples, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [n] of every response of the batch, 0 where it is not kept, and whether it is: float64 and bool
    [prompts, group size]."""
    own = torch.stack([numbers * samples.kept, samples.kept.double()], 1)
    found = samples.gather(own).view(-1, samples.group_size, 2)
    return found[..., 0], found[..., 1] > 0


def _signal(samples: Samples, rewards: Tensor, advantages: Tensor) -> Signal:
    """The signal of advantages [prompts, group size] that hold for whole responses."""
    own = advantages.view(-1, 1)[samples.rows].to(rewards.dtype) * samples.mask
    return Signal(rewards=rewards, advantages=own, returns=own)
