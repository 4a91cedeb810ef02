"""A training step as the memory model sees it: degrees, batch and settings as arrays; and the parts of its stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cost_models.candidates import Array
from cost_models.stages import default_layers
from plans.layout import Unit, layer_unit, model_units, trained_units
from plans.model import Head, ModelSpec

OPERATOR_RECOMPUTE = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingCase:
    """Arrays over candidates, then what all of them share.

    sequences: per micro-batch and dp rank. micro_batches: per step and dp rank. recompute: 0 none, 1 selective, 2 full,
    3 every other matrix product (`OPERATOR_RECOMPUTE`, torchtitan's selective mode).
    zero: 0 nothing sharded over dp, 1 masters and optimizer, 3 gradients and weights too (FSDP).
    tokens: sequence length. element: bytes of a weight. flash: fused attention. dropout: hidden and attention dropout.
    head_share: of the tokens that head and loss run on.
    own_fullest, own_last: see `Candidates`.
    """

    dp: Array
    tp: Array
    pp: Array
    cp: Array
    ep: Array
    vpp: Array
    sequences: Array
    micro_batches: Array
    sequence_parallel: NDArray[np.bool_]
    recompute: NDArray[np.int8]
    zero: Array
    tokens: int
    element: float = 2.0
    flash: bool = True
    dropout: bool = False
    head_share: float = 1.0
    own_fullest: Array | float = 0.0
    own_last: Array | float = 0.0

    @property
    def rank_tokens(self) -> Array:
        """Tokens of one micro-batch on one rank."""
        return self.sequences * self.tokens / self.cp

    @property
    def replicas(self) -> Array:
        """Ranks that hold the same dense weights: dp x cp."""
        return self.dp * self.cp

    @property
    def scores(self) -> Array:
        """Keys per query that an unfused attention keeps; 0 for flash attention."""
        return np.zeros_like(self.tp) if self.flash else np.full_like(self.tp, self.tokens)


@dataclass(frozen=True, slots=True)
class Elements:
    """Elements of a unit: cut by tp, held whole, and in its experts (spread by ep alone); and of its matrices.

    largest: the largest matrix. shapes: one of each distinct shape.
    """

    sharded: float
    replicated: float
    experts: float
    largest: float
    shapes: float


def unit_elements(unit: Unit, experts: Sequence[Unit] = ()) -> Elements:
    """Elements of a unit of the layout; of a block with its experts."""
    cut = [p for p in unit.parameters if len(p.shape) == 2 and p.axis is not None]
    whole = [p for expert in experts[:1] for p in expert.parameters]  # all experts are alike
    matrices = {p.shape: p.size for p in cut + whole}
    return Elements(
        sharded=unit.sharded,
        replicated=unit.replicated,
        experts=sum(expert.replicated for expert in experts),
        largest=max(matrices.values(), default=0),
        shapes=sum(matrices.values()),
    )


@dataclass(frozen=True, slots=True)
class ModelParts:
    """Elements of a model's units: blocks with experts where there are some, and blocks without; `head_inputs`:
    vocabulary entries that the last stage computes per token. adapters: of a block, None without LoRA; they are not in
    the others."""

    embedding: Elements
    block: Elements
    dense: Elements
    head: Elements
    head_inputs: int
    adapters: Elements | None = None


@lru_cache(maxsize=64)
def model_parts(spec: ModelSpec) -> ModelParts:
    """Elements of the units of `plans.layout`; every block of a kind has the same."""
    units = model_units(spec.base)
    place = {unit.name: at for at, unit in enumerate(units)}
    blocks = {spec.has_experts(layer): place[layer_unit(layer)] for layer in reversed(range(spec.layers))}
    dense = blocks.get(False, blocks.get(True, 0))
    block = blocks.get(True, dense)
    return ModelParts(
        embedding=unit_elements(units[0]),
        block=unit_elements(units[block], units[block + 1 : block + 1 + spec.experts] if True in blocks else ()),
        dense=unit_elements(units[dense]),
        head=unit_elements(units[-1]),
        head_inputs=spec.padded_vocab if spec.head is Head.LM else 0,
        adapters=unit_elements(trained_units(spec)[0]) if spec.lora else None,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class StageParts:
    """What one pipeline stage holds, before tp and ep cut it; arrays over candidates.

    index: the stage. layers: blocks. embedding: elements of the input embedding, 0 on other stages. vocabulary: rows of
    the output projection, 0 on other stages. shapes, largest: of a block's matrices, see `Elements`.

    With LoRA (`frozen`) adapters_cut and adapters_whole are what tp cuts and does not cut of the adapters, which alone
    are trained: shapes and largest are of their matrices, and the embedding, whose gradient nobody asks for, is 0.
    """

    index: Array
    layers: Array
    sharded: Array
    replicated: Array
    experts: Array
    embedding: Array
    vocabulary: Array
    shapes: float
    largest: float
    adapters_cut: Array | float = 0.0
    adapters_whole: Array | float = 0.0
    frozen: bool = False


def stage_parts(
    spec: ModelSpec, pp: Array, *, last: bool, own_fullest: Array | float = 0.0, own_last: Array | float = 0.0
) -> StageParts:
    """The first or the last stage. Stages in between hold no more than the first, so one of the two is the fullest:
    where stages are uneven the first counts with the layers of the fullest, which is an upper bound; and where first
    layers lack experts, with those of a stage that has none of them."""
    parts = model_parts(spec)
    fullest, ending = default_layers(spec.layers, pp)
    own = np.asarray(own_fullest) > 0
    layers = np.where(own, own_last, ending) if last else np.where(own, own_fullest, fullest)
    first_here, last_here = (pp == 1, np.ones_like(pp, dtype=bool)) if last else (np.ones_like(pp, dtype=bool), pp == 1)
    tied_copy = last_here & ~first_here & (spec.tied_embeddings and spec.head is Head.LM)
    embeddings = first_here.astype(float) + tied_copy
    sparse = np.minimum(np.ceil(layers / spec.experts_every), spec.expert_layers) if spec.experts else layers

    def blocks(kind: str) -> Array:
        held: Array = sparse * getattr(parts.block, kind) + (layers - sparse) * getattr(parts.dense, kind)
        return held

    adapters = parts.adapters
    trained = [parts.block, parts.dense] if adapters is None else [adapters]
    return StageParts(
        index=pp - 1 if last else np.zeros_like(pp),
        layers=layers,
        sharded=blocks("sharded") + embeddings * parts.embedding.sharded + last_here * parts.head.sharded,
        replicated=blocks("replicated") + embeddings * parts.embedding.replicated + last_here * parts.head.replicated,
        experts=sparse * parts.block.experts,
        embedding=first_here * float(parts.embedding.sharded if adapters is None else 0),
        vocabulary=last_here * float(parts.head_inputs),
        shapes=max(part.shapes for part in trained),
        largest=max(part.largest for part in trained),
        adapters_cut=layers * (adapters.sharded if adapters else 0.0),
        adapters_whole=layers * (adapters.replicated if adapters else 0.0),
        frozen=adapters is not None,
    )
