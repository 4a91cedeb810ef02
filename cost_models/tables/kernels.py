"""Measured kernels of the GPUs that ship with the project: GEMM, attention and collectives inside a node.

`gemm_efficiency` is the share of `GpuSpec.bf16_tflops` at which C[m, n] = A[m, k] B[k, n] runs, so its time is
2 m n k / (bf16_tflops x 1e12 x value); the share falls with m because small products are bound by memory, so nothing
is to be added for reading the weights. `m` is the tokens of a micro-batch on a rank, and `n`, `k` are the widths after
tp: of the fused query-key-value projection, say, n = qkv_width / tp and k = hidden. dgrad and wgrad are the same
product with the roles exchanged: (m, k, n) and (k, n, m).

`attention_prefill_efficiency` is the share of the peak of causal flash attention, forward, head dimension 128, of which
half of the scores count: 2 x head_dim x tokens^2 FLOPs per lane (attention heads on the rank x sequences).
`attention_decode_efficiency` is the share of the memory bandwidth: 2 x 2 bytes x head_dim x cached tokens per lane
(key-value heads x sequences). `*_node`: seconds of collectives between 2, 4 or 8 GPUs, by bytes of the whole vector.

Measured points off the grid are met within 2 to 7 % (median; 90 % of them within 5 to 22 %, the A100 being the worst).
The tables are in `library/kernels/`; `scripts/import_aiconfigurator.py` makes them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from cost_models.tables.table_file import load_table
from cost_models.tables.tables import CostTable

_TABLES = {
    "a100-40gb": "a100",
    "a100-80gb": "a100",
    "a800-80gb": "a100",
    "h100-80gb-sxm": "h100",
    "h800-80gb": "h100",
    "h200-141gb": "h200",
    "b200-180gb": "b200",
    "b300-288gb": "b200",
    "l40s": "l40s",
}
_OTHER_LINKS = ("a800-80gb", "h800-80gb")
"""The same chips with fewer links: the collectives of the table are not theirs."""


@cache
def kernel_table(gpu: str) -> CostTable | None:
    """The kernel table of a GPU kind (`GpuSpec.name`), None where none was measured.

    A100 with 40 GB has the chip and clocks of the one with 80 GB, but slower memory: its decode shares are of that.
    """
    if gpu not in _TABLES:
        return None
    table = load_table(Path(str(files("cost_models") / "library" / "kernels" / f"{_TABLES[gpu]}.json")))
    if gpu not in _OTHER_LINKS:
        return table
    own = {name: entry for name, entry in table.entries.items() if not name.endswith("_node")}
    return replace(table, hardware=gpu, entries=own)
