"""What a reward function is refused for."""

from __future__ import annotations

from plans.errors import RealplanError


class RewardError(RealplanError):
    """A reward function that cannot be loaded, fails, or returns what is no score. `sample`: the place in the lists of
    the sample that did it, None when no one did."""

    def __init__(self, message: str, hint: str = "", sample: int | None = None) -> None:
        super().__init__(message, hint)
        self.sample = sample
