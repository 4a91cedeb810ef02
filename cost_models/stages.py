"""Layers of pipeline stages, for arrays of layouts (`plans.layout.default_split`)."""

from __future__ import annotations

import numpy as np

from cost_models.candidates import Array, Candidates
from plans.model import ModelSpec


def default_layers(layers: int, pp: Array) -> tuple[Array, Array]:
    """Layers of the fullest stage and of the last one: the middle takes what is over (Llama-3's 126 over 8: 15 at both
    ends, 16 between)."""
    least, fullest = np.floor(layers / pp), np.ceil(layers / pp)
    rest = layers - least * pp
    return fullest, np.where(np.floor((pp - rest) / 2) + rest == pp, fullest, least)


def stage_layers(spec: ModelSpec, candidates: Candidates) -> tuple[Array, Array]:
    """Layers of the fullest stage and of the last one, by the default split or by a candidate's own."""
    c = candidates
    fullest, last = default_layers(spec.layers, c.pp)
    own = c.own_fullest > 0
    return np.where(own, c.own_fullest, fullest), np.where(own, c.own_last, last)
