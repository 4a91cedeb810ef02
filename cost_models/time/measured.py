"""Times of measured kernels on a machine: what the kernel table of its GPU says, in seconds.

Every function answers with `Answer` (seconds, source, reach), and falls back to the analytic formula where nothing was
measured. They ask for `machine.kernels`, which is there only for engines that go by measured kernels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cost_models.candidates import Array
from cost_models.tables.interpolation import Answer
from cost_models.tables.tables import CostTable
from cost_models.time.machine import Machine

HEAD_DIM = 128
"""Head dimension of the measured attention kernels."""
RANKS = (2.0, 4.0, 8.0)
"""Group sizes of the measured collectives."""


def gemm(machine: Machine, m: Array, n: Array | float, k: Array | float, analytic: Array) -> Answer:
    """Seconds of C[m, n] = A[m, k] B[k, n]: 2 m n k / peak x (1 / measured share + throttle)."""
    ideal = m * n * k * (2.0 / machine.peak_flops)
    share = _table(machine).answer("gemm_efficiency", {"m": m, "n": n, "k": k}, ideal / analytic)
    return _throttled(machine, ideal, share)


def attention(machine: Machine, head_dim: int, tokens: Array, length: Array, heads: Array) -> Answer:
    """Seconds of causal fused attention, forward: 2 x tokens x length x heads x head_dim FLOPs (half of the scores).

    Lanes are heads x sequences, `tokens` / `length` of those."""
    ideal = 2.0 * tokens * length * heads * (head_dim / machine.peak_flops)
    points = {"lanes": heads * tokens / length, "sequence_tokens": length}
    share = _attention_share(machine, "prefill", head_dim, points, machine.engine.attention_efficiency)
    return _throttled(machine, ideal, share)


def decode_attention(machine: Machine, head_dim: int, rows: Array, length: Array, kv_heads: Array) -> Answer:
    """Seconds to read rows x length x 2 x kv_heads x head_dim elements of the KV cache."""
    kv_bytes = 2.0 * head_dim * machine.element_bytes * rows * kv_heads * length
    points = {"lanes": rows * kv_heads, "cached_tokens": length}
    share = _attention_share(machine, "decode", head_dim, points, machine.engine.kv_efficiency)
    return Answer(kv_bytes / (1e9 * machine.cluster.gpu.hbm_gbps) / share.value, share.source, share.beyond)


def _attention_share(
    machine: Machine, kind: str, head_dim: int, points: Mapping[str, Array], analytic: float
) -> Answer:
    """Share of the peak or bandwidth; the engine's constant for head dimensions that nobody measured."""
    table = _table(machine) if head_dim == HEAD_DIM else _NOTHING
    return table.answer(f"attention_{kind}_efficiency", points, analytic)


def collective(machine: Machine, operation: str, message: Array, size: Array) -> Answer:
    """Seconds of an NCCL collective between `RANKS` ranks inside a node."""
    points = {"ranks": size, "bytes": np.maximum(message, 1.0)}
    return _table(machine).answer(f"{operation}_node", points, np.nan)


def _table(machine: Machine) -> CostTable:
    assert machine.kernels is not None, "the engine does not go by measured kernels"
    return machine.kernels


def _throttled(machine: Machine, ideal: Array, share: Answer) -> Answer:
    return Answer(ideal * (1.0 / share.value + machine.engine.throttle), share.source, share.beyond)


_NOTHING = CostTable(hardware="", device="", precision="", date="", source="")
