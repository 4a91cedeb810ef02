"""Losses of response tokens [response tokens] -> a number: sums divided by the count of the whole minibatch, so that
the losses of micro-batches and replicas add up. Each comes with terms to report, which add up likewise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.sequences import run_sums

Loss = tuple[Tensor, Mapping[str, Tensor]]
TokenWeights = Tensor | float
"""What each response token counts in a loss, over the whole minibatch one in all."""


@dataclass(frozen=True, slots=True)
class Clip:
    """Ratios count from 1 - low to 1 + high; with a negative advantage to `dual` at most, where there is one."""

    low: float
    high: float
    dual: float | None = None


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip: Clip,
    weights: TokenWeights,
    *,
    tokens: float,
    lengths: Sequence[int] | None = None,
) -> Loss:
    """The clipped objective (Schulman et al. 2017, eq. 7; the dual clip: Ye et al. 2020, eq. 5). `tokens`: of the whole
    minibatch, for the terms to report. lengths: of the responses, whose ratio is that of the whole response, the
    geometric mean of its tokens' (GSPO: Zheng et al. 2025, eq. 7)."""
    difference = logprobs - old_logprobs
    ratio = (difference if lengths is None else _response_means(difference, lengths)).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip.low, 1 + clip.high)
    each = torch.maximum(plain, clipped)
    if clip.dual is not None:
        each = torch.where(advantages < 0, torch.minimum(each, -advantages * clip.dual), each)
    loss, counts = (each * weights).sum(), counted(weights)
    terms = {
        "pg_loss": loss,
        "ppo_kl": -(difference * counts).sum() / tokens,
        "pg_clipfrac": ((clipped > plain) * counts).sum() / tokens,
    }
    return loss, terms


def counted(weights: TokenWeights) -> Tensor:
    """1 for tokens that count in the loss, 0 for those of samples that are left out."""
    return torch.as_tensor(weights).gt(0).float()


def _response_means(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """The mean of each response's numbers, at every token of it."""
    counts = torch.tensor(lengths, dtype=torch.int64, device=values.device)
    return (run_sums(values, lengths) / counts.clamp_min(1)).repeat_interleave(counts)


def kl_estimate(log_ratio: Tensor, estimator: str) -> Tensor:
    """An estimate of KL(p || p_ref) from d = log p - log p_ref at tokens drawn from p (Schulman 2020): k1 = d,
    k2 = d^2 / 2, k3 = exp(-d) - 1 + d."""
    match estimator:
        case "k1":
            return log_ratio
        case "k2":
            return 0.5 * log_ratio.square()
    return (-log_ratio).exp() - 1 + log_ratio


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, weights: TokenWeights, estimator: str = "k3") -> Loss:
    """The KL to the reference, by k3 as in GRPO (Shao et al. 2024, eq. 4)."""
    loss = (kl_estimate(logprobs - ref_logprobs, estimator) * weights).sum()
    return loss, {"kl_loss": loss}


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float, counts: TokenWeights, *, tokens: float
) -> Loss:
    """Half the squared error, the larger of plain and clipped around the old values, as a mean over the tokens that
    count. counts: 1 or 0 for each token; tokens: those of the whole minibatch that count."""
    near = values.clamp(old_values - clip, old_values + clip)
    plain, clipped = (values - returns).square(), (near - returns).square()
    loss = 0.5 * (torch.maximum(plain, clipped) * counts).sum() / tokens
    terms = {
        "vf_loss": loss,
        "vf_clipfrac": ((clipped > plain) * counts).sum() / tokens,
        "vpred_mean": (values * counts).sum() / tokens,
    }
    return loss, terms
