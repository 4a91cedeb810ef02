"""Importance correction: what generation drew is not quite what the policy would draw that training starts from.

Generation computes otherwise than training, and under `--async` with older weights. Its ratio is p(old) / p(generation)
of each token, where `old` is the policy before the first step, recomputed in a layout of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from plans.hyperparameters import Ppo
from runtime.sequences import run_sums


def importance(old_logprobs: Tensor, gen_logprobs: Tensor, lengths: Sequence[int], settings: Ppo) -> Tensor:
    """What each response token [response tokens] weighs in the objective: min(p(old) / p(generation), cap), of the
    token (truncated importance sampling: Yao et al. 2025) or of the whole response, the product over its tokens."""
    assert settings.importance_cap is not None
    log_ratio = old_logprobs - gen_logprobs
    if settings.importance == "sequence":
        counts = torch.tensor(lengths, dtype=torch.int64, device=log_ratio.device)
        log_ratio = run_sums(log_ratio, lengths).repeat_interleave(counts)
    return log_ratio.clamp_max(math.log(settings.importance_cap)).exp()


def mismatch(old_logprobs: Tensor, gen_logprobs: Tensor, cap: float | None) -> dict[str, Tensor]:
    """How far generation is from the policy that training starts from, by tokens, under verl's names: KL(generation ||
    old) by k1 and k3, the ratio p(old) / p(generation), and with a cap the share of ratios beyond it."""
    log_ratio = old_logprobs - gen_logprobs
    ratio = log_ratio.exp()
    found = {
        "rollout_corr/kl": -log_ratio,
        "rollout_corr/k3_kl": ratio - 1 - log_ratio,
        "rollout_corr/rollout_is": ratio,
    }
    if cap is not None:
        found["rollout_corr/rollout_is/clip_ratio"] = ratio > cap
    return found
