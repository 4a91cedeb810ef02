"""Algorithms as plain tensor functions: advantages of a batch, and losses. `table` joins the online ones under their
names; the names are here for who must not import torch."""

from __future__ import annotations

ONLINE = ("ppo", "grpo", "rloo", "remax", "reinforce++")
GROUPED = ("grpo", "rloo")  # they need several samples per prompt
# Algorithms that learn from given responses, and the columns of the data that hold them: the samples of a prompt.
OFFLINE = {"sft": ("response",), "dpo": ("chosen", "rejected"), "reward-modelling": ("chosen", "rejected")}
TRAINABLE = (*ONLINE, *OFFLINE)
