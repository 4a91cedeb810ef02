"""Frequencies of rotary positions, computed as `transformers` computes them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import assert_never

import torch
from torch import Tensor

from plans.model import ModelSpec
from plans.rope import DynamicScaling, LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling


def frequencies(spec: ModelSpec, device: torch.device) -> Tensor:
    """Angle per position of each rotated pair of dimensions: float32 [rotated / 2].

    Where the kind of scaling depends on how long a sample is, for samples of up to `original_max_position` tokens.
    """
    width, scaling = spec.rotated, spec.rope_scaling
    wavelengths = spec.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    match scaling:
        case None | DynamicScaling():
            return 1.0 / wavelengths
        case LinearScaling():
            return 1.0 / wavelengths / scaling.factor
        case Llama3Scaling():
            return _llama3(1.0 / wavelengths, scaling)
        case YarnScaling():
            return _yarn(wavelengths, scaling, spec.rope_theta)
        case LongRopeScaling():
            return 1.0 / (torch.tensor(scaling.short_factor, dtype=torch.float32, device=device) * wavelengths)
        case _:
            assert_never(scaling)


def local_rope(spec: ModelSpec) -> ModelSpec | None:
    """The specification as layers with a window rotate, where they differ: another theta, and no scaling."""
    if not spec.local_rope_theta:
        return None
    return replace(spec, rope_theta=spec.local_rope_theta, rope_scaling=None, local_rope_theta=0.0)


def amplitude(spec: ModelSpec) -> float:
    """What cosines and sines are multiplied by."""
    scaling = spec.rope_scaling
    return scaling.attention_factor if isinstance(scaling, YarnScaling | LongRopeScaling) else 1.0


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    turns = scaling.original_max_position * plain / (2 * math.pi)  # of a pair, over the original context
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    ramp = ramp.clamp(0, 1)
    return (1 - ramp) * plain / scaling.factor + ramp * plain


def _yarn(wavelengths: Tensor, scaling: YarnScaling, theta: float) -> Tensor:
    pairs = len(wavelengths)

    def dimension(turns: float) -> float:
        """The dimension that turns so often over the original context."""
        return 2 * pairs * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(pairs, dtype=torch.float32, device=wavelengths.device) - low) / (high - low)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
