"""What other systems, or a careful engineer, would do: plans like any other, each costed with what it runs on.

Every way takes (workload, cluster, engine of the searched plan) and gives a contender, or why there is none.
"""

from __future__ import annotations

from planner.baselines.base import Contender, Way, plain
from planner.baselines.deepspeed_chat import deepspeed_chat
from planner.baselines.openrlhf import openrlhf
from planner.baselines.uniform import real_heuristic, symmetric
from planner.baselines.verl import verl

BASELINES: dict[str, Way] = {
    "symmetric": plain("symmetric", symmetric),
    "real-heuristic": plain("real-heuristic", real_heuristic),
    "verl": verl,
    "openrlhf": openrlhf,
    "deepspeed-chat": deepspeed_chat,
}

__all__ = ["BASELINES", "Contender", "Way", "real_heuristic", "symmetric"]
