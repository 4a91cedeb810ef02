"""What a row of a measurements file may hold, and what is taken where it says nothing.

    key                                    rule                          where it is null or absent
    id, measured                           text, object                  an error: the row cannot be told or judged
    gpus                                   whole number                  tp x pp x cp x dp
    gpus_per_node                          whole number                  8, or all GPUs where there are fewer
    tp, pp, cp, ep, vpp                    whole number                  1
    dp                                     whole number                  gpus / (tp x pp x cp)
    mbs, gbs, seq_len, batch, ...          positive number               the row is not predicted
    zero                                   0 to 3                        3 for fsdp, 1 for megatron, else 0
    seq_parallel                           true or false                 whether megatron, flash attention and tp > 1
    recompute                              none, selective, full         none
    attention                              flash, unfused                flash
    engine (training)                      megatron, megatron-deepspeed, megatron
                                           fsdp
    host (inference)                       eager, graphs, native         eager
    precision                              bf16, fp16, fp32              the row is not predicted
    gpu                                    a GPU of the catalogue        the row is not predicted
    model, arch                            text, object                  one of the two suffices

A broken rule makes the row unpredictable, with key and rule as the reason; other rows of the file are still judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

COUNTS = (
    "gpus",
    "gpus_per_node",
    "tp",
    "pp",
    "vpp",
    "dp",
    "cp",
    "ep",
    "etp",
    "seq_len",
    "batch",
    "output_len",
    "batch_size",
    "prompt_tokens",
    "response_tokens",
    "minibatches",
)
AMOUNTS = ("mbs", "gbs", "input_len")
TEXTS = (
    "stage",
    "model",
    "gpu",
    "engine",
    "attention",
    "host",
    "precision",
    "recompute",
    "notes",
    "mode",
    "group",
    "plan",
    "source",
    "algorithm",
    "framework",
)
ARCH_COUNTS = (
    "layers",
    "hidden",
    "heads",
    "kv_heads",
    "head_dim",
    "ffn",
    "vocab",
    "moe_ffn",
    "experts",
    "topk",
    "shared_ffn",
)
ARCH_FLAGS = ("gated_mlp", "tied")
LARGEST = 1e12
"""Counts beyond this are slips: no sequence, batch, vocabulary or cluster is so large."""

Rule = tuple[Callable[[Any], bool], str]


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_amount(value: Any) -> bool:
    return is_number(value) and 0 < value <= LARGEST


def _is_count(value: Any) -> bool:
    return _is_amount(value) and value == int(value)


COUNT: Rule = (_is_count, "must be a positive whole number")
COUNT_OR_NONE: Rule = (lambda value: value == 0 or _is_count(value), "must be a whole number that is not negative")
AMOUNT: Rule = (_is_amount, "must be a positive number")
FLAG: Rule = (lambda value: isinstance(value, bool), "must be true or false")
TEXT: Rule = (lambda value: isinstance(value, str), "must be a text")
OBJECT: Rule = (lambda value: isinstance(value, dict), "must be an object")
STAGE: Rule = (lambda value: value in (0, 1, 2, 3), "must be a ZeRO stage, 0 to 3")
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(COUNTS, COUNT),
    **dict.fromkeys(AMOUNTS, AMOUNT),
    **dict.fromkeys(TEXTS, TEXT),
    "zero": STAGE,
    "seq_parallel": FLAG,
    "arch": OBJECT,
    "models": OBJECT,
}
ARCH_RULES: Mapping[str, Rule] = {**dict.fromkeys(ARCH_COUNTS, COUNT_OR_NONE), **dict.fromkeys(ARCH_FLAGS, FLAG)}


def row_problem(row: Mapping[str, Any]) -> str:
    """The first rule that a row breaks, with its key and value; empty where it breaks none."""
    problem = _broken(row, RULES)
    if problem:
        return problem
    problem = _broken(row.get("arch") or {}, ARCH_RULES)
    if problem:
        return f"arch.{problem}"
    for role, model in (row.get("models") or {}).items():
        if not isinstance(model, str):
            return f"models.{role} is {model!r}; it must be a text"
    return _inconsistent(row)


def _broken(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> str:
    for key, (holds, rule) in rules.items():
        if values.get(key) is not None and not holds(values[key]):
            return f"{key} is {values[key]!r}; it {rule}"
    return ""


def _inconsistent(row: Mapping[str, Any]) -> str:
    """Degrees that do not fill the GPUs, and heads that do not share the width."""
    degrees = [row.get(key) or 1 for key in ("tp", "pp", "cp")]
    product, gpus = math.prod(degrees) * (row.get("dp") or 1), row.get("gpus")
    if gpus and row.get("dp") and product != gpus:
        return f"gpus is {gpus}; tp x pp x cp x dp is {product:g}"
    if gpus and gpus % product:
        return f"gpus is {gpus}; it must be a multiple of tp x pp x cp, {product:g}"
    arch = row.get("arch") or {}
    heads, kv_heads = arch.get("heads"), arch.get("kv_heads")
    if heads and kv_heads and heads % kv_heads:
        return f"arch.heads is {heads}; it must be a multiple of arch.kv_heads, {kv_heads}"
    return ""
