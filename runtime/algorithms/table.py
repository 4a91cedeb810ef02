"""Advantages of the algorithms that generate their responses, by the names of `plans.algorithms`."""

from __future__ import annotations

from collections.abc import Mapping

from runtime.algorithms.groups import grpo, rloo
from runtime.algorithms.ppo import ppo
from runtime.algorithms.reinforce import reinforce_pp, remax
from runtime.algorithms.samples import Advantages

ADVANTAGES: Mapping[str, Advantages] = {
    "ppo": ppo,
    "grpo": grpo,
    "rloo": rloo,
    "remax": remax,
    "reinforce++": reinforce_pp,
}
