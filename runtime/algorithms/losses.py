"""Losses of response tokens [response tokens] -> a number: sums divided by the count of the whole minibatch, so that
the losses of micro-batches and replicas add up. Each comes with terms to report, which add up likewise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Loss = tuple[Tensor, Mapping[str, Tensor]]


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float, tokens: float) -> Loss:
    """The clipped objective (Schulman et al. 2017, eq. 7); `tokens` are those of the whole minibatch."""
    difference = logprobs - old_logprobs
    ratio = difference.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = torch.maximum(plain, clipped).sum() / tokens
    terms = {
        "pg_loss": loss,
        "ppo_kl": -difference.sum() / tokens,
        "pg_clipfrac": (clipped > plain).sum() / tokens,
    }
    return loss, terms


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, tokens: float) -> Loss:
    """The KL to the reference by the estimator k3 = r - 1 - log r with r = p_ref / p (Shao et al. 2024, eq. 4)."""
    difference = ref_logprobs - logprobs
    loss = (difference.exp() - 1 - difference).sum() / tokens
    return loss, {"kl_loss": loss}


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float, tokens: float) -> Loss:
    """Half the squared error, the larger of plain and clipped around the old values; normalised as `policy_loss`."""
    near = values.clamp(old_values - clip, old_values + clip)
    plain, clipped = (values - returns).square(), (near - returns).square()
    loss = 0.5 * torch.maximum(plain, clipped).sum() / tokens
    terms = {
        "vf_loss": loss,
        "vf_clipfrac": (clipped > plain).sum() / tokens,
        "vpred_mean": values.sum() / tokens,
    }
    return loss, terms
