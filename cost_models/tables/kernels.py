"""Measured kernels of the GPUs that ship with the project: GEMM, attention and collectives inside a node.

For a time model: `gemm_efficiency(gpu, m, n, k)` is the share of `GpuSpec.bf16_tflops` at which C[m, n] = A[m, k]
B[k, n] runs, so its time is 2 m n k / (bf16_tflops x 1e12 x value); the share falls with m because small products are
bound by memory, so nothing is to be added for reading the weights. `m` is the tokens of a micro-batch on a rank, and
`n`, `k` are the widths after tp: of the fused query-key-value projection, say, n = qkv_width / tp and k = hidden.
dgrad and wgrad are the same product with the roles exchanged: (m, k, n) and (k, n, m). All arguments broadcast;
`fallback` answers, marked analytic, where nothing was measured, which is everywhere on GPUs without a table.
Measured points off the grid are met within 2 to 7 % (median; 90 % of them within 5 to 22 %, the A100 being the worst).

The tables are in `library/kernels/`; `scripts/import_aiconfigurator.py` makes them.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

from cost_models.candidates import Array
from cost_models.tables.interpolation import Answer
from cost_models.tables.tables import CostTable, load_table

_TABLES = {
    "a100-40gb": "a100",
    "a100-80gb": "a100",
    "h100-80gb-sxm": "h100",
    "h200-141gb": "h200",
    "b200-180gb": "b200",
    "l40s": "l40s",
}


@cache
def kernel_table(gpu: str) -> CostTable | None:
    """The kernel table of a GPU kind (`GpuSpec.name`), None where none was measured.

    A100 with 40 GB has the chip and clocks of the one with 80 GB, but slower memory: its decode shares are of that.
    """
    if gpu not in _TABLES:
        return None
    return load_table(Path(str(files("cost_models") / "library" / "kernels" / f"{_TABLES[gpu]}.json")))


def gemm_efficiency(gpu: str, m: Array | float, n: Array | float, k: Array | float, fallback: Array | float) -> Answer:
    """Share of the bf16 matrix peak."""
    return _table_or_empty(gpu).answer("gemm_efficiency", {"m": m, "n": n, "k": k}, fallback)


def prefill_efficiency(gpu: str, lanes: Array | float, tokens: Array | float, fallback: Array | float) -> Answer:
    """Share of the bf16 matrix peak of causal flash attention, forward, head dimension 128.

    Half of the scores count: 2 x head_dim x tokens^2 FLOPs per lane. lanes: attention heads on the rank x sequences.
    """
    points = {"lanes": lanes, "sequence_tokens": tokens}
    return _table_or_empty(gpu).answer("attention_prefill_efficiency", points, fallback)


def decode_efficiency(gpu: str, lanes: Array | float, cached: Array | float, fallback: Array | float) -> Answer:
    """Share of the memory bandwidth of decode attention: 2 x 2 bytes x head_dim x cached per lane.

    lanes: key-value heads on the rank x sequences.
    """
    points = {"lanes": lanes, "cached_tokens": cached}
    return _table_or_empty(gpu).answer("attention_decode_efficiency", points, fallback)


def collective_seconds(
    gpu: str, operation: str, ranks: Array | float, vector_bytes: Array | float, fallback: Array | float
) -> Answer:
    """Seconds of `all_reduce`, `all_gather`, `reduce_scatter`, `all_to_all` (NCCL) or `custom_all_reduce` (one kernel)
    between 2, 4 or 8 GPUs of a node; bytes of the whole vector."""
    points = {"ranks": ranks, "bytes": vector_bytes}
    return _table_or_empty(gpu).answer(f"{operation}_node", points, fallback)


def _table_or_empty(gpu: str) -> CostTable:
    """The table of a GPU, or one without entries."""
    return kernel_table(gpu) or CostTable(hardware=gpu, device="", precision="bf16", date="", source="")
