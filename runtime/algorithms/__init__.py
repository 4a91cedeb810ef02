"""Algorithms as plain tensor functions: advantages of a batch, and losses. `table` joins them under their names."""

from __future__ import annotations

# The names of `table.ALGORITHMS`, for who must not import torch.
TRAINABLE = ("ppo", "grpo", "rloo", "remax", "reinforce++")
GROUPED = ("grpo", "rloo")  # they need several samples per prompt
