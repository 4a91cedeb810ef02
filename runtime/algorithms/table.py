"""Algorithms by the names of their graphs (`plans.algorithms`)."""

from __future__ import annotations

from runtime.algorithms.groups import grpo, rloo
from runtime.algorithms.ppo import ppo
from runtime.algorithms.reinforce import reinforce_pp, remax
from runtime.algorithms.samples import Algorithm

ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(advantages=ppo),
    "grpo": Algorithm(advantages=grpo, kl_in_loss=True),
    "rloo": Algorithm(advantages=rloo),
    "remax": Algorithm(advantages=remax),
    "reinforce++": Algorithm(advantages=reinforce_pp),
}
