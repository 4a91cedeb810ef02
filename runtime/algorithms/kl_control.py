"""The coefficient of the KL to the reference, where it follows a target."""

from __future__ import annotations

import math

MOST_ERROR = 0.2
"""Of the KL, as a part of its target, that one iteration answers to."""


def adapted(coefficient: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """The coefficient after an iteration (Ziegler et al. 2019, section 2.2): it grows by the error of the KL, as a part
    of the target and within 0.2, times samples / horizon, and shrinks likewise.

    kl: the mean KL of whole responses in nats. samples: of the iteration; after `horizon` samples that are all 20 %
    off or more the coefficient has changed by about 20 %. A KL that is not finite changes nothing.
    """
    if not math.isfinite(kl):
        return coefficient
    error = min(max(kl / target - 1.0, -MOST_ERROR), MOST_ERROR)
    return coefficient * (1.0 + error * min(1.0, samples / horizon))
