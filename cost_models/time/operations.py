"""Operations on one GPU: GEMM, attention core, streaming kernels, head and loss, optimizer; seconds, vectorised.

`tokens` are those of one rank's forward pass, an array [candidates]; `tp` likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cost_models.candidates import Array, Flags
from cost_models.time import measured
from cost_models.time.distinct import on_distinct
from cost_models.time.machine import Machine
from plans.model import Head, ModelSpec


@dataclass(frozen=True, eq=False)
class Gemm:
    """`count` products C[m, n] = A[m, k] B[k, n]; arrays [candidates] or numbers."""

    m: Array
    n: Array | float
    k: Array | float
    count: Array | float = 1.0


def gemm(machine: Machine, m: Array, n: Array | float, k: Array | float) -> Array:
    """Seconds of C[m, n] = A[m, k] B[k, n].

    Measured where the engine goes by kernel tables, otherwise hypot(compute, memory): compute = 2 m n k / (peak x
    efficiency) x (1 + e/m)(1 + e/n)(1 + e/k) with e the half extent, memory = (mk + kn + mn) bytes / bandwidth. The
    hypotenuse follows the measured passage from weight streaming to compute within 4 % (aiconfigurator's A100 GEMM
    table: m = 64, 128, 256, 512 over n, k >= 4096).
    """
    engine = machine.engine
    extent = engine.gemm_half_extent
    padded = (m + extent) * (n + extent) * (k + extent)
    compute = padded * (2.0 / (machine.peak_flops * engine.gemm_efficiency))
    memory = (m * k + n * k + m * n) * (machine.element_bytes / machine.memory_bytes_per_s)
    seconds: Array = np.sqrt(compute * compute + memory * memory)
    return seconds if machine.kernels is None else measured.gemm(machine, m, n, k, seconds).value


def backward_gemm(machine: Machine, m: Array, n: Array | float, k: Array | float) -> Array:
    """Seconds of dgrad, C[m, k], and wgrad, C[k, n], of a product C[m, n]; analytic: a multiple of the forward."""
    ratio = machine.engine.backward_gemm_ratio
    if machine.kernels is None:
        return gemm(machine, m, n, k) * ratio
    dgrad, wgrad = gemm(machine, m, np.asarray(k), n), gemm(machine, np.asarray(k), n, m)
    return (dgrad + wgrad) * (0.5 * ratio)


def linears(machine: Machine, spec: ModelSpec, tokens: Array, tp: Array, ep: Array) -> tuple[Array, Array]:
    """Seconds of the GEMMs of one layer: forward, backward."""
    gemms = layer_gemms(spec, tokens, tp, ep)
    forward = sum((gemm(machine, g.m, g.n, g.k) * g.count for g in gemms), np.zeros_like(tokens))
    if machine.kernels is None:
        return forward, forward * machine.engine.backward_gemm_ratio
    backward = sum((backward_gemm(machine, g.m, g.n, g.k) * g.count for g in gemms), np.zeros_like(tokens))
    return forward, backward


def layer_gemms(spec: ModelSpec, tokens: Array, tp: Array, ep: Array) -> list[Gemm]:
    """The products of one layer on one rank, forward: query-key-value, attention output, and the MLP's."""
    kv_width = np.maximum(spec.kv_heads / tp, 1.0) * spec.head_dim
    head_width = spec.heads * spec.head_dim / tp
    hidden = float(spec.hidden)
    attention = [Gemm(tokens, head_width + 2 * kv_width, hidden), Gemm(tokens, hidden, head_width)]
    return attention + _mlp_gemms(spec, tokens, tp, ep)


def _mlp_gemms(spec: ModelSpec, tokens: Array, tp: Array, ep: Array) -> list[Gemm]:
    """The MLP's GEMMs.

    With experts: each of the experts / ep local ones takes its share tokens x ep x k / experts; of those only the
    expected number that any token chose, E (1 - (1 - k/E)^tokens), is run (it matters in decoding).
    """
    gates = 2.0 if spec.gated_mlp else 1.0
    hidden = float(spec.hidden)

    def mlp(rows: Array, ffn: Array, count: Array | float) -> list[Gemm]:
        return [Gemm(rows, gates * ffn, hidden, count), Gemm(rows, hidden, ffn, count)]

    if not spec.experts:
        return mlp(tokens, spec.ffn / tp, 1.0)
    group_tokens = tokens * ep
    share = spec.experts_per_token / spec.experts
    used = -np.expm1(group_tokens * np.log1p(-share)) if share < 1 else np.ones_like(tokens)
    experts: Array = np.maximum(spec.experts / ep * used, 1.0)
    routed = mlp(group_tokens * spec.experts_per_token / (experts * ep), spec.ffn / tp, experts)
    return routed + (mlp(tokens, spec.shared_ffn / tp, 1.0) if spec.shared_ffn else [])


def attention_core(machine: Machine, spec: ModelSpec, tokens: Array, length: Array, tp: Array, cp: Array) -> Array:
    """Seconds of softmax(Q K^T) V of one layer, forward; `length` is the whole sequence.

    FLOPs 4 tokens x length x heads x head_dim, halved by causality in the fused kernel (FlashAttention-2, section
    3.1). Unfused kernels do all of them and pass over the score matrix in memory.
    """
    engine = machine.engine
    heads = spec.heads / tp
    flops = 4.0 * tokens * length * (heads * spec.head_dim)
    if engine.flash_attention:
        if machine.kernels is not None:
            return measured.attention(machine, spec.head_dim, tokens, length, heads).value
        return flops * (0.5 / (machine.peak_flops * engine.attention_efficiency))
    scores = tokens * length * heads * machine.element_bytes
    return flops / (machine.peak_flops * engine.attention_efficiency) + scores * (
        engine.softmax_passes / machine.memory_bytes_per_s
    )


def streaming(machine: Machine, spec: ModelSpec, tokens: Array, tp: Array, sequence_parallel: Flags) -> Array:
    """Seconds of norms, residuals, dropout and activation function of one layer, forward: bytes / bandwidth.

    Sequence parallelism divides the [tokens, hidden] part by tp (Korthikanti et al. 2022, section 4.2.2).
    """
    engine = machine.engine
    widths = engine.hidden_passes * spec.hidden / np.where(sequence_parallel, tp, 1.0)
    active = spec.experts_per_token * spec.ffn + spec.shared_ffn if spec.experts else spec.ffn
    gates = 1.5 if spec.gated_mlp else 1.0
    widths = widths + engine.ffn_passes * gates * active / tp
    return tokens * widths * (machine.element_bytes / machine.memory_bytes_per_s)


def head(machine: Machine, spec: ModelSpec, tokens: Array, tp: Array) -> Array:
    """Seconds of the output head's GEMM, forward; a value head streams the hidden states once."""
    if spec.head is Head.VALUE:
        return tokens * (spec.hidden * machine.element_bytes / machine.memory_bytes_per_s)
    return _vocabulary(gemm, machine, spec, tokens, tp)


def head_backward(machine: Machine, spec: ModelSpec, tokens: Array, tp: Array) -> Array:
    """Seconds of the head's dgrad and wgrad; a value head streams the hidden states twice."""
    if spec.head is Head.VALUE:
        return head(machine, spec, tokens, tp) * machine.engine.backward_gemm_ratio
    return _vocabulary(backward_gemm, machine, spec, tokens, tp)


def _vocabulary(product: Callable[..., Array], machine: Machine, spec: ModelSpec, tokens: Array, tp: Array) -> Array:
    def seconds(tokens: Array, tp: Array) -> Array:
        return product(machine, tokens, spec.padded_vocab / tp, float(spec.hidden))

    return seconds(tokens, tp) if machine.kernels is None else on_distinct(seconds, tokens, tp)


def loss(machine: Machine, spec: ModelSpec, tokens: Array, tp: Array) -> Array:
    """Seconds of the vocabulary-parallel cross entropy (or log-probs), forward: passes over fp32 logits."""
    if spec.head is Head.VALUE:
        return np.zeros_like(tokens)
    return tokens * (spec.padded_vocab / tp) * (4.0 * machine.engine.loss_passes / 2 / machine.memory_bytes_per_s)


def optimizer_update(machine: Machine, params: Array) -> Array:
    """Seconds to clip and apply Adam on `params` local parameters: memory traffic only."""
    return params * (machine.engine.optimizer_bytes / machine.memory_bytes_per_s)
