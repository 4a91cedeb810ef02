"""Published peak memory: from a row of `library/measurements` to the case that the memory model predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cost_models.candidates import FULL_RECOMPUTE, NO_RECOMPUTE, SELECTIVE_RECOMPUTE, Array
from cost_models.engines.engine import memory_habits
from cost_models.engines.habits import MemoryHabits
from cost_models.memory.latent import LATENT_MODELS, latent_training_terms
from cost_models.memory.memory_terms import MemoryTerms
from cost_models.memory.memory_training import training_terms
from cost_models.memory.training_case import OPERATOR_RECOMPUTE, TrainingCase
from cost_models.validation.published import Unpredictable, number, train_engine_name, whole
from cost_models.validation.row_layouts import row_degrees, row_dp, row_sequence_parallel, row_zero
from cost_models.validation.row_schema import MEMORY_QUANTITIES
from plans.cluster import GIB
from plans.errors import SpecError
from plans.model import ModelSpec, Norm, Position

ELEMENT_BYTES: Mapping[str, float] = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0}
FUSED_LOSS_BYTES = 0.0
"""Peak bytes per logit of a fused cross entropy beside the logits, which their gradient overwrites."""
RECOMPUTE_CODES: Mapping[str, int] = {
    "none": NO_RECOMPUTE,
    "selective": SELECTIVE_RECOMPUTE,
    "selective-op": OPERATOR_RECOMPUTE,
    "full": FULL_RECOMPUTE,
}


def training_case_of(
    *, dp: int, tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1, vpp: int = 1, micro_batch: float = 1,
    micro_batches: float = 1, seq_len: int, recompute: str = "none", sequence_parallel: bool = False, zero: int = 1,
    precision: str = "bf16", flash: bool = True, dropout: bool = False,
) -> TrainingCase:  # fmt: skip
    """One training layout from plain numbers, as arrays of shape [1].

    micro_batch: sequences per forward pass and dp rank. micro_batches: per step and dp rank. recompute: `none`,
    `selective`, `selective-op` (every other matrix product) or `full`. zero: 0, 1, 2 (as 1) or 3. precision: bf16, fp16
    or fp32.
    """
    if precision not in ELEMENT_BYTES:
        raise SpecError(f"precision `{precision}` has no memory model", f"one of {', '.join(ELEMENT_BYTES)}")
    if recompute not in RECOMPUTE_CODES:
        raise SpecError(f"recompute `{recompute}` has no memory model", f"one of {', '.join(RECOMPUTE_CODES)}")

    def scalar(value: float) -> Array:
        return np.array([float(value)])

    return TrainingCase(
        dp=scalar(dp),
        tp=scalar(tp),
        pp=scalar(pp),
        cp=scalar(cp),
        ep=scalar(ep),
        vpp=scalar(vpp),
        sequences=scalar(micro_batch),
        micro_batches=scalar(micro_batches),
        sequence_parallel=np.array([sequence_parallel]),
        recompute=np.array([RECOMPUTE_CODES[recompute]], dtype=np.int8),
        zero=scalar(zero),
        tokens=seq_len,
        element=ELEMENT_BYTES[precision],
        flash=flash,
        dropout=dropout,
    )


@dataclass(frozen=True, slots=True)
class MemoryPrediction:
    """Predicted peak of one row: `quantity` is the key of the row's `measured`; gib is None where `reason` says why."""

    quantity: str
    gib: float | None
    reason: str = ""


def predict_memory(row: Mapping[str, Any], quantity: str = "") -> MemoryPrediction:
    """The peak memory of a published training row, GiB per GPU: `quantity` of its `measured`, or the first that it has.

    `peak_mem_alloc_gib` is torch's max_memory_allocated (largest over ranks), `peak_mem_reserved_gib` and
    `peak_mem_gib` its max_memory_reserved. What a row does not publish takes the defaults that times take
    (`row_schema`); a size without a default is not guessed.
    """
    quantity = quantity or next((key for key in MEMORY_QUANTITIES if row["measured"].get(key) is not None), "")
    if not quantity:
        return MemoryPrediction("", None, "no peak memory was measured")
    if quantity not in MEMORY_QUANTITIES:
        return MemoryPrediction(quantity, None, f"no model of `{quantity}` (known: {', '.join(MEMORY_QUANTITIES)})")
    missing = [key for key in ("mbs", "gbs", "seq_len") if not row.get(key)]
    if missing:
        return MemoryPrediction(quantity, None, f"not published: {', '.join(missing)}")
    try:
        terms = _row_terms(row)
    except SpecError as error:
        return MemoryPrediction(quantity, None, error.message)
    except Unpredictable as why:
        return MemoryPrediction(quantity, None, str(why))
    peak = terms.allocated_bytes if quantity == "peak_mem_alloc_gib" else terms.reserved_bytes
    return MemoryPrediction(quantity, float(peak[0]) / GIB)


def _row_terms(row: Mapping[str, Any]) -> MemoryTerms:
    recompute, dp = str(row.get("recompute") or "none").split("(")[0], row_dp(row)
    case = training_case_of(
        dp=dp,
        **row_degrees(row),
        micro_batch=number(row, "mbs"),
        micro_batches=number(row, "gbs") / (dp * number(row, "mbs")),
        seq_len=whole(row, "seq_len"),
        recompute=recompute,
        sequence_parallel=row_sequence_parallel(row),
        zero=row_zero(row),
        precision=str(row.get("precision") or "of the row (not published)"),
        flash=row.get("attention") != "unfused",
        dropout=_megatron_defaults(row),
    )
    model = str(row.get("model") or "")
    if model in LATENT_MODELS:
        layers = (row.get("arch") or {}).get("layers")
        if not layers:
            raise SpecError("not published: layers of the model")
        return latent_training_terms(LATENT_MODELS[model], layers, case, row_habits(row))
    return training_terms(memory_row_spec(row), case, row_habits(row))


def row_habits(row: Mapping[str, Any]) -> MemoryHabits:
    """Habits of the engine that a row names, with what its settings say: a fused cross entropy (`cef` in its name), and
    gradient accumulation that is not fused (an argument in its notes)."""
    name = train_engine_name(row)
    habits = memory_habits("fsdp" if row_zero(row) >= 3 else name)
    if str(row["id"]).endswith("_cef"):
        habits = replace(habits, logit_bytes=FUSED_LOSS_BYTES)
    if "--no-gradient-accumulation-fusion" in (row.get("notes") or ""):
        habits = replace(habits, wgrad_buffers=False)
    return habits


def memory_row_spec(row: Mapping[str, Any]) -> ModelSpec:
    """The architecture of a row; Megatron's own test models are GPT-3 blocks where it does not say otherwise."""
    arch = row.get("arch") or {}
    missing = [key for key in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab") if not arch.get(key)]
    if missing:
        raise SpecError(f"not published: {', '.join(missing)} of the model")
    gpt3 = _megatron_defaults(row) and not arch.get("gated_mlp")
    return ModelSpec(
        name=str(row.get("model") or row["id"]),
        layers=arch["layers"],
        hidden=arch["hidden"],
        heads=arch["heads"],
        kv_heads=arch["kv_heads"],
        head_dim=arch.get("head_dim") or arch["hidden"] // arch["heads"],
        ffn=arch.get("moe_ffn") or arch["ffn"],
        vocab=arch["vocab"],
        gated_mlp=bool(arch.get("gated_mlp")),
        tied_embeddings=bool(arch.get("tied")),
        norm=Norm.LAYER if gpt3 else Norm.RMS,
        position=Position.LEARNED if gpt3 else Position.ROPE,
        max_context=row["seq_len"],
        linear_bias=gpt3,
        experts=arch.get("experts") or 0,
        experts_per_token=arch.get("topk") or 0,
    )


def _megatron_defaults(row: Mapping[str, Any]) -> bool:
    """Whether a row is a run of Megatron-LM's own tests, which keep its defaults: dropout 0.1, biases, LayerNorm."""
    return row.get("stage") == "ci"
