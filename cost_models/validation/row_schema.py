"""What a row of a measurements file may hold, and what is taken where it says nothing.

    key                                    rule                          where it is null or absent
    id, measured                           text, object                  an error: the row cannot be told or judged
    measured.*                             from 1e-15 to 1e15            that quantity is not predicted
    bar                                    true, false, quantities       PPO iterations count, others do not; if no row
                                                                         of the files has it, all predicted rows count
    gpus                                   whole number                  tp x pp x cp x dp
    gpus_per_node                          whole number                  8, or all GPUs where there are fewer
    tp, pp, cp, ep, vpp                    whole number                  1
    dp                                     whole number                  gpus / (tp x pp x cp)
    mbs, gbs, seq_len, batch, ...          whole number                  the row is not predicted
    input_len                              positive number               the row is not predicted
    zero                                   0 to 3                        3 for fsdp, 1 for megatron with flash
                                                                         attention, else 0
    seq_parallel                           true or false                 whether megatron, flash attention and tp > 1
    recompute                              none, selective, full         none
                                           (memory: selective-op)
    attention                              flash, unfused                flash
    engine (training)                      megatron, megatron-deepspeed, megatron
                                           fsdp
    host (inference)                       eager, graphs, native         eager
    precision                              bf16, fp16, fp32              the row is not predicted
    gpu                                    a GPU of the catalogue        times are not predicted (PPO: a100-80gb)
    model, arch                            text, object                  one of the two suffices
    notes                                  text                          "800 Gb/s per node" is the network,
                                                                         or else the catalogue's

The sizes must agree: gpus with the degrees and with whole nodes, gbs with dp x mbs, pp and tp with layers and heads. A
broken rule makes the row unpredictable, with key and rule as the reason; other rows of the file are still judged.

Two marks matter to memory alone: an id that ends in `_cef` stands for a loss of fused cross entropy, and notes with
`--no-gradient-accumulation-fusion` for that setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from plans.library import load_model, model_names

TIME_QUANTITIES = ("step_time_s", "prefill_ms", "decode_ms_per_token", "total_latency_ms", "iteration_s")
MEMORY_QUANTITIES = ("peak_mem_alloc_gib", "peak_mem_reserved_gib", "peak_mem_gib")
DEGREES = ("gpus", "gpus_per_node", "tp", "pp", "vpp", "dp", "cp", "ep", "etp")
COUNTS = (
    "seq_len",
    "mbs",
    "gbs",
    "batch",
    "output_len",
    "batch_size",
    "prompt_tokens",
    "response_tokens",
    "minibatches",
)
AMOUNTS = ("input_len",)
"""Means over requests, which need not be whole."""
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
"""Counts beyond this are slips: no sequence, batch or vocabulary is so large."""
MOST_ROW_GPUS = 1_000_000
MOST_LAYERS = 10_000
"""The memory model goes through all layers of a model."""
MAGNITUDES = (1e-15, 1e15)
"""Seconds, milliseconds and GiB beyond these are slips."""
SHOWN = 60
"""Characters of a value that a reason shows."""

KeyRule = tuple[Callable[[Any], bool], str]


def is_number(value: object) -> bool:
    """Whether a value is a finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_magnitude(value: object) -> bool:
    """Whether a value is a positive number that a measurement or a prediction can be."""
    return isinstance(value, int | float) and is_number(value) and MAGNITUDES[0] <= value <= MAGNITUDES[1]


def short(value: object) -> str:
    """A value as a reason shows it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _is_count(value: Any) -> bool:
    return _is_amount(value) and value == int(value)


def _is_amount(value: Any) -> bool:
    return is_number(value) and 0 < value <= LARGEST


def _is_bar(value: Any) -> bool:
    known = (*TIME_QUANTITIES, *MEMORY_QUANTITIES)
    return isinstance(value, bool) or (isinstance(value, list) and all(entry in known for entry in value))


COUNT: KeyRule = (_is_count, "must be a positive whole number")
COUNT_OR_NONE: KeyRule = (lambda value: value == 0 or _is_count(value), "must be a whole number that is not negative")
AMOUNT: KeyRule = (_is_amount, "must be a positive number")
LAYERS: KeyRule = (
    lambda value: value == 0 or (_is_count(value) and value <= MOST_LAYERS),
    f"must be a whole number that is not negative, {MOST_LAYERS} at the most",
)
DEGREE: KeyRule = (
    lambda value: _is_count(value) and value <= MOST_ROW_GPUS,
    f"must be a positive whole number, {MOST_ROW_GPUS} at the most",
)
BAR: KeyRule = (_is_bar, f"must be true, false or a list of {', '.join((*TIME_QUANTITIES, *MEMORY_QUANTITIES))}")
FLAG: KeyRule = (lambda value: isinstance(value, bool), "must be true or false")
TEXT: KeyRule = (lambda value: isinstance(value, str), "must be a text")
OBJECT: KeyRule = (lambda value: isinstance(value, dict), "must be an object")
STAGE: KeyRule = (lambda value: is_number(value) and value in (0, 1, 2, 3), "must be a ZeRO stage, 0 to 3")
RULES: Mapping[str, KeyRule] = {
    **dict.fromkeys(COUNTS, COUNT),
    **dict.fromkeys(DEGREES, DEGREE),
    **dict.fromkeys(AMOUNTS, AMOUNT),
    **dict.fromkeys(TEXTS, TEXT),
    "bar": BAR,
    "zero": STAGE,
    "seq_parallel": FLAG,
    "arch": OBJECT,
    "models": OBJECT,
}
ARCH_RULES: Mapping[str, KeyRule] = {
    **dict.fromkeys(ARCH_COUNTS, COUNT_OR_NONE),
    **dict.fromkeys(ARCH_FLAGS, FLAG),
    "layers": LAYERS,
}


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
            return f"models.{role} is {short(model)}; it must be a text"
    return _inconsistent(row)


def _broken(values: Mapping[str, Any], rules: Mapping[str, KeyRule]) -> str:
    for key, (holds, rule) in rules.items():
        if values.get(key) is not None and not holds(values[key]):
            return f"{key} is {short(values[key])}; it {rule}"
    return ""


def _inconsistent(row: Mapping[str, Any]) -> str:
    """Sizes that are possible alone but not together."""
    model_ranks = math.prod(row.get(key) or 1 for key in ("tp", "pp", "cp"))
    dp, gpus = row.get("dp"), row.get("gpus")
    problem = _unfilled(row, model_ranks)
    if problem:
        return problem
    ranks = dp or (gpus // model_ranks if gpus else None)
    return _uneven_batch(row, ranks) or _cut_too_fine(row)


def _unfilled(row: Mapping[str, Any], model_ranks: int) -> str:
    """Degrees that do not fill the GPUs, or GPUs that do not fill their nodes."""
    dp, gpus = row.get("dp"), row.get("gpus")
    if gpus and dp and model_ranks * dp != gpus:
        return f"gpus is {gpus}; tp x pp x cp x dp is {model_ranks * dp:.12g}"
    if gpus and gpus % model_ranks:
        return f"gpus is {gpus}; it must be a multiple of tp x pp x cp, {model_ranks:.12g}"
    world, per_node = gpus or model_ranks * (dp or 1), row.get("gpus_per_node") or 8
    if world > MOST_ROW_GPUS:
        return f"tp x pp x cp x dp is {world:.12g}; {DEGREE[1].replace('must', 'it must', 1)}"
    if (gpus or dp) and world > per_node and world % per_node:
        return f"gpus is {world:.12g}; beyond one node it must be a multiple of gpus_per_node, {per_node}"
    return ""


def _uneven_batch(row: Mapping[str, Any], ranks: float | None) -> str:
    """A batch that is no whole number of micro-batches on every data-parallel rank."""
    gbs, mbs = row.get("gbs"), row.get("mbs")
    if gbs and mbs and ranks and gbs % (ranks * mbs):
        return f"gbs is {gbs}; it must be a multiple of dp x mbs, {ranks * mbs:.12g}"
    return ""


def _cut_too_fine(row: Mapping[str, Any]) -> str:
    """Heads that do not share the width, and more parts of a model than it has layers or heads."""
    arch = row.get("arch") or {}
    layers, heads, kv_heads = (arch.get(key) for key in ("layers", "heads", "kv_heads"))
    if not arch and row.get("model") in model_names():
        spec = load_model(row["model"])
        layers, heads, kv_heads = spec.layers, spec.heads, spec.kv_heads
    tp, pp, vpp = (row.get(key) or 1 for key in ("tp", "pp", "vpp"))
    if heads and kv_heads and heads % kv_heads:
        return f"arch.heads is {heads}; it must be a multiple of arch.kv_heads, {kv_heads}"
    if heads and tp > heads:
        return f"tp is {tp}; it must be at most the attention heads of the model, {heads}"
    if layers and pp > layers:
        return f"pp is {pp}; it must be at most the layers of the model, {layers}"
    # Megatron may count the embedding and the head as a layer each when it cuts a model into chunks.
    if layers and pp * vpp > layers + 2:
        return f"pp x vpp is {pp * vpp:.12g}; it must be at most the layers of the model, {layers}, and two"
    return ""
