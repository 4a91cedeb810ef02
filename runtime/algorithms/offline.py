"""Losses of algorithms that learn from given responses: SFT, DPO and reward modelling.

Samples 2i and 2i + 1 of a micro-batch are the chosen and the rejected response of a pair. Sums are divided by counts of
the whole minibatch, as in `runtime.algorithms.losses`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from runtime.algorithms.losses import Loss
from runtime.sequences import run_sums


def sft_loss(logprobs: Tensor, tokens: float) -> Loss:
    """Cross-entropy of response tokens."""
    loss = -logprobs.sum() / tokens
    return loss, {"loss": loss}


def dpo_loss(logprobs: Tensor, ref_logprobs: Tensor, lengths: Sequence[int], beta: float, pairs: int) -> Loss:
    """DPO (Rafailov et al. 2023, eq. 7) of the log-probabilities of 2 m responses of the given lengths; the terms have
    TRL's names."""
    return pair_loss(beta * run_sums(logprobs - ref_logprobs, lengths), pairs)


def pair_loss(rewards: Tensor, pairs: int) -> Loss:
    """Bradley-Terry: -log sigmoid(chosen - rejected), of rewards [2 m]."""
    chosen, rejected = rewards[0::2], rewards[1::2]
    loss = -F.logsigmoid(chosen - rejected).sum() / pairs
    terms = {
        "loss": loss,
        "rewards/chosen": chosen.sum() / pairs,
        "rewards/rejected": rejected.sum() / pairs,
        "rewards/margins": (chosen - rejected).sum() / pairs,
        "rewards/accuracies": (chosen > rejected).sum() / pairs,
    }
    return loss, terms
