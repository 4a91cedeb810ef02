"""The search space: every legal layout of every call within the user's limits, priced."""
