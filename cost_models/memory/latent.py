"""Memory of DeepSeek models cut down to a few layers, stage by stage, for published rows.

The memory model takes every stage for one without dense layers, an upper bound that is too high where one layer of four
is dense: measured peaks of such models test the expert and pipeline terms, so that their stages are counted exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cost_models.candidates import Array
from cost_models.engines.habits import MemoryHabits
from cost_models.memory.activations import BlockWidths
from cost_models.memory.memory_terms import MemoryTerms
from cost_models.memory.memory_training import fullest_stage, stage_terms
from cost_models.memory.training_case import StageParts, TrainingCase


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """A DeepSeek architecture: the first layer is dense, the others have experts."""

    hidden: int
    heads: int
    ffn: int
    vocab: int
    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    experts: int
    experts_per_token: int
    expert_ffn: int
    shared_ffn: int

    @property
    def attention_params(self) -> int:
        """Parameters of the low-rank query, the compressed key-value and the output projection."""
        query = self.hidden * self.q_rank + self.q_rank * self.heads * (self.nope_dim + self.rope_dim)
        compressed = self.hidden * (self.kv_rank + self.rope_dim)
        key_value = self.kv_rank * self.heads * (self.nope_dim + self.value_dim)
        return query + compressed + key_value + self.heads * self.value_dim * self.hidden

    @property
    def expert_params(self) -> int:
        """Parameters of all experts of a layer."""
        return self.experts * 3 * self.hidden * self.expert_ffn

    @property
    def expert_layer_dense_params(self) -> int:
        """Parameters of an expert layer that are not experts: attention, shared expert, router."""
        return self.attention_params + 3 * self.hidden * self.shared_ffn + self.hidden * self.experts

    @property
    def dense_layer_params(self) -> int:
        """Parameters of the dense layer."""
        return self.attention_params + 3 * self.hidden * self.ffn

    @property
    def attention_width(self) -> int:
        """Elements per token that attention stores: both down-projections and their norms, query, key, the joint
        key-value that the values are a view of, and the output."""
        ranks = 2 * (self.q_rank + self.kv_rank) + self.rope_dim
        query_key = 2 * self.heads * (self.nope_dim + self.rope_dim)
        return ranks + query_key + self.heads * (self.nope_dim + 2 * self.value_dim)


LATENT_MODELS: Mapping[str, LatentSpec] = {
    "deepseekv2": LatentSpec(
        hidden=5120,
        heads=128,
        ffn=12288,
        vocab=102400,
        q_rank=1536,
        kv_rank=512,
        nope_dim=128,
        rope_dim=64,
        value_dim=128,
        experts=160,
        experts_per_token=6,
        expert_ffn=1536,
        shared_ffn=3072,
    ),
    "deepseekv3": LatentSpec(
        hidden=7168,
        heads=128,
        ffn=18432,
        vocab=129280,
        q_rank=1536,
        kv_rank=512,
        nope_dim=128,
        rope_dim=64,
        value_dim=128,
        experts=256,
        experts_per_token=8,
        expert_ffn=2048,
        shared_ffn=2048,
    ),
}


def _widths(spec: LatentSpec, dense_share: float) -> BlockWidths:
    experts = spec.experts_per_token * (3 * spec.expert_ffn + 2 * spec.hidden) + 3 * spec.shared_ffn
    mlp = dense_share * 3 * spec.ffn + (1.0 - dense_share) * experts
    return BlockWidths(
        stream=4.0 * spec.hidden,
        cut=spec.attention_width + mlp,
        heads=float(spec.heads),
        keys=float(spec.heads * (spec.nope_dim + spec.rope_dim + spec.value_dim)),
        hidden=float(spec.hidden),
        norm_bytes=6.0 * spec.hidden,
        mlp=float(max(3 * spec.ffn * (dense_share > 0), experts * (dense_share < 1))),
    )


def latent_training_terms(spec: LatentSpec, layers: int, case: TrainingCase, habits: MemoryHabits) -> MemoryTerms:
    """Memory of a training step of the first `layers` layers on the fullest of first and last stage."""
    pp = int(case.pp[0])
    first, last = (_stage_terms(spec, layers, index, pp, case, habits) for index in (0, pp - 1))
    return fullest_stage(first, last)


def _stage_terms(
    spec: LatentSpec, layers: int, index: int, pp: int, case: TrainingCase, habits: MemoryHabits
) -> MemoryTerms:
    here = layers // pp
    dense = 1 if index == 0 else 0
    vocabulary = spec.vocab * spec.hidden
    ends = (index == 0) + (index == pp - 1)
    matrices = (spec.heads * spec.value_dim * spec.hidden, spec.q_rank * spec.heads * (spec.nope_dim + spec.rope_dim))
    mlp = 3 * spec.hidden * (spec.ffn if dense else spec.expert_ffn)

    def scalar(value: float) -> Array:
        return np.array([float(value)])

    stage = StageParts(
        index=scalar(index),
        layers=scalar(here),
        sharded=scalar(
            ends * vocabulary + dense * spec.dense_layer_params + (here - dense) * spec.expert_layer_dense_params
        ),
        replicated=scalar((2 * here + (index == pp - 1)) * spec.hidden),
        experts=scalar((here - dense) * spec.expert_params),
        embedding=scalar((index == 0) * vocabulary),
        vocabulary=scalar((index == pp - 1) * spec.vocab),
        shapes=float(sum(matrices) + mlp),
        largest=float(max(*matrices, mlp * 2 // 3)),
    )
    return stage_terms(stage, _widths(spec, dense / here), case, habits)
