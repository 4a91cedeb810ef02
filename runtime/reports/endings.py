"""How a run ends before its last iteration."""

from __future__ import annotations

from plans.errors import RealplanError


class RunFailed(RealplanError):
    """A run that ended on some rank. `details`: that rank's traceback, where it had one; `nonfinite`: the iteration
    whose numbers are not finite, where that is the cause."""

    def __init__(self, message: str, hint: str = "", details: str = "", nonfinite: int | None = None) -> None:
        super().__init__(message, hint)
        self.details = details
        self.nonfinite = nonfinite


class Beyond(RunFailed):
    """A run whose policy has gone further from the reference than `kl_bound` before an iteration."""

    def __init__(self, iteration: int, kl: float, bound: float) -> None:
        super().__init__(
            f"iteration {iteration}: the mean KL to the reference is {kl:.4g}, beyond kl_bound = {bound:g}",
            "a smaller learning rate, a larger ppo.kl_coefficient, or a larger kl_bound",
        )
        self.iteration = iteration


class Stopped(RunFailed):
    """A run that somebody stopped; nothing is wrong with it."""
