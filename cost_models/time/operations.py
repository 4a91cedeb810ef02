"""Operations on one GPU: GEMM, attention core, streaming kernels, head and loss, optimizer; seconds, vectorised.

`tokens` are those of one rank's forward pass, an array [candidates]; `tp` likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cost_models.candidates import Array, Flags
from cost_models.distinct import distinct
from cost_models.engines.machine import Machine
from plans.model import Head, ModelSpec


@dataclass(frozen=True, eq=False)
class Gemm:
    """`count` products C[m, n] = A[m, k] B[k, n]; arrays [candidates] or numbers."""

    m: Array
    n: Array | float
    k: Array | float
    count: Array | float = 1.0


def linears(machine: Machine, spec: ModelSpec, tokens: Array, tp: Array, ep: Array) -> Array:
    """Seconds of the GEMMs of one layer, forward."""
    seconds = np.zeros_like(tokens)
    for g in layer_gemms(spec, tokens, tp, ep) + adapter_gemms(spec, tokens, tp):
        seconds = seconds + machine.kernels.gemm(g.m, g.n, g.k) * g.count
    return seconds


def linears_both_ways(machine: Machine, spec: ModelSpec, tokens: Array, tp: Array, ep: Array) -> tuple[Array, Array]:
    """Seconds of the GEMMs of one layer: forward, and dgrad and wgrad of each; of frozen weights the dgrad alone."""
    forward, backward = np.zeros_like(tokens), np.zeros_like(tokens)
    frozen = layer_gemms(spec, tokens, tp, ep) if spec.lora else []
    for g in adapter_gemms(spec, tokens, tp) if spec.lora else layer_gemms(spec, tokens, tp, ep):
        one, two = machine.kernels.gemm_and_backward(g.m, g.n, g.k)
        forward, backward = forward + one * g.count, backward + two * g.count
    for g in frozen:
        forward = forward + machine.kernels.gemm(g.m, g.n, g.k) * g.count
        backward = backward + _dgrad(machine, g) * g.count
    return forward, backward


def _dgrad(machine: Machine, g: Gemm) -> Array:
    """Seconds of the gradient of a product's input, C[m, k]."""
    return machine.kernels.gemm(g.m, g.k, g.n)


def adapter_gemms(spec: ModelSpec, tokens: Array, tp: Array) -> list[Gemm]:
    """The thin products of a layer's adapters on one GPU (Hu et al. 2021): to the rank, and from it. Of a
    column-parallel linear tp cuts the second, of a row-parallel one the first."""
    if spec.lora is None:
        return []
    rank, gates = float(spec.lora.rank), 2.0 if spec.gated_mlp else 1.0
    whole = np.ones_like(tp)
    sides = {  # in, out and what cuts them
        "linear_qkv": (spec.hidden / whole, spec.qkv_width / tp),
        "linear_proj": (spec.heads * spec.head_dim / tp, spec.hidden / whole),
        "linear_fc1": (spec.hidden / whole, gates * spec.ffn / tp),
        "linear_fc2": (spec.ffn / tp, spec.hidden / whole),
    }
    chosen = [sides[target] for target in spec.lora.targets]
    return [gemm for into, out in chosen for gemm in (Gemm(tokens, rank, into), Gemm(tokens, out, rank))]


def layer_gemms(spec: ModelSpec, tokens: Array, tp: Array, ep: Array) -> list[Gemm]:
    """The products of one layer on one rank, forward: query-key-value, attention output, and the MLP's."""
    if spec.kv_rank:
        return _latent_gemms(spec, tokens, tp) + _mlp_gemms(spec, tokens, tp, ep)
    kv_width = np.maximum(spec.kv_heads / tp, 1.0) * spec.head_dim
    head_width = spec.heads * spec.head_dim / tp
    hidden = float(spec.hidden)
    attention = [Gemm(tokens, head_width + 2 * kv_width, hidden), Gemm(tokens, hidden, head_width)]
    return attention + _mlp_gemms(spec, tokens, tp, ep)


def _latent_gemms(spec: ModelSpec, tokens: Array, tp: Array) -> list[Gemm]:
    """Latent attention's products: down to the ranks (whole on every tp rank), up to the heads, and the output. In
    generation keys and values are not made anew for every cached token: the same products act on query and output
    instead (DeepSeek-V2, arXiv:2405.04434, 2.1.2)."""
    hidden, heads = float(spec.hidden), spec.heads / tp
    nope = spec.head_dim - spec.rotary_dim
    down = [Gemm(tokens, float(rank), hidden) for rank in (spec.q_rank, spec.latent_width) if rank]
    up = [
        Gemm(tokens, heads * spec.head_dim, float(spec.q_rank or spec.hidden)),
        Gemm(tokens, heads * (nope + spec.value_width), float(spec.kv_rank)),
    ]
    return [*down, *up, Gemm(tokens, hidden, heads * spec.value_width)]


def _mlp_gemms(spec: ModelSpec, tokens: Array, tp: Array, ep: Array) -> list[Gemm]:
    """The MLP's GEMMs.

    Experts are not cut by tp. The ep ranks of a run bring the tokens of ep / tp replicas together (sequence parallel
    ranks a part each), and each of the experts / ep local ones takes its share, tokens x ep / tp x k / experts; of
    those only the expected number that any token chose, E (1 - (1 - k/E)^tokens), is run (it matters in decoding).
    Where only some layers have experts, products count by their share of the layers.
    """
    gates = 2.0 if spec.gated_mlp else 1.0
    hidden = float(spec.hidden)

    def mlp(rows: Array, ffn: Array, count: Array | float) -> list[Gemm]:
        return [Gemm(rows, gates * ffn, hidden, count), Gemm(rows, hidden, ffn, count)]

    if not spec.experts:
        return mlp(tokens, spec.ffn / tp, 1.0)
    group_tokens, sparse = tokens * ep / tp, spec.expert_layers / spec.layers
    share = spec.experts_per_token / spec.experts
    used = -np.expm1(group_tokens * np.log1p(-share)) if share < 1 else np.ones_like(tokens)
    experts: Array = np.maximum(spec.experts / ep * used, 1.0)
    rows = group_tokens * spec.experts_per_token / (experts * ep)
    routed = mlp(rows, np.full_like(tokens, spec.ffn), experts * sparse)
    shared = mlp(tokens, spec.shared_ffn / tp, sparse) if spec.shared_ffn else []
    return routed + shared + (mlp(tokens, spec.dense_ffn / tp, 1.0 - sparse) if sparse < 1 else [])


def attention_core(machine: Machine, spec: ModelSpec, tokens: Array, length: Array, tp: Array) -> Array:
    """Seconds of softmax(Q K^T) V of one layer, forward; `length` is the whole sequence.

    Unfused kernels do all 4 tokens x length x heads x head_dim FLOPs, the masked half too, and pass over the score
    matrix in memory.
    """
    constants, heads = machine.constants, spec.heads / tp
    width = (spec.head_dim + spec.value_width) // 2  # of a head's keys and values, in the mean
    if constants.flash_attention:
        return machine.kernels.attention(width, tokens, length, heads)
    flops = 4.0 * tokens * length * (heads * width)
    scores = tokens * length * heads * machine.element_bytes
    return flops / (machine.peak_flops * constants.attention_efficiency) + scores * (
        constants.softmax_passes / machine.memory_bytes_per_s
    )


def streaming(machine: Machine, spec: ModelSpec, tokens: Array, tp: Array, sequence_parallel: Flags) -> Array:
    """Seconds of norms, residuals, dropout and activation function of one layer, forward: bytes / bandwidth.

    Sequence parallelism divides the [tokens, hidden] part by tp (Korthikanti et al. 2022, section 4.2.2).
    """
    constants = machine.constants
    widths = constants.hidden_passes * spec.hidden / np.where(sequence_parallel, tp, 1.0)
    active = float(spec.ffn)
    if spec.experts:
        sparse = spec.expert_layers / spec.layers
        active = (spec.experts_per_token * spec.ffn + spec.shared_ffn) * sparse + spec.dense_ffn * (1.0 - sparse)
    gates = 1.5 if spec.gated_mlp else 1.0
    widths = widths + constants.ffn_passes * gates * active / tp
    return tokens * widths * (machine.element_bytes / machine.memory_bytes_per_s)


def head(machine: Machine, spec: ModelSpec, tokens: Array, tp: Array) -> Array:
    """Seconds of the output head's GEMM, forward; a value head streams the hidden states once."""
    if spec.head is Head.VALUE:
        return _value_head(machine, spec, tokens)
    first, inverse = distinct(tokens, tp)
    return machine.kernels.gemm(tokens[first], spec.padded_vocab / tp[first], float(spec.hidden))[inverse]


def head_both_ways(machine: Machine, spec: ModelSpec, tokens: Array, tp: Array) -> tuple[Array, Array]:
    """Seconds of the head, and of its dgrad and wgrad (a frozen one has no wgrad); a value head streams the hidden
    states once and twice."""
    if spec.head is Head.VALUE:
        forward = _value_head(machine, spec, tokens)
        return forward, forward * machine.constants.backward_gemm_ratio
    first, inverse = distinct(tokens, tp)
    widths = spec.padded_vocab / tp[first]
    if spec.lora:
        g = Gemm(tokens[first], widths, float(spec.hidden))
        return machine.kernels.gemm(g.m, g.n, g.k)[inverse], _dgrad(machine, g)[inverse]
    forward, backward = machine.kernels.gemm_and_backward(tokens[first], widths, float(spec.hidden))
    return forward[inverse], backward[inverse]


def _value_head(machine: Machine, spec: ModelSpec, tokens: Array) -> Array:
    return tokens * (spec.hidden * machine.element_bytes / machine.memory_bytes_per_s)


def loss(machine: Machine, spec: ModelSpec, tokens: Array, tp: Array) -> Array:
    """Seconds of the vocabulary-parallel cross entropy (or log-probs), forward: passes over fp32 logits."""
    if spec.head is Head.VALUE:
        return np.zeros_like(tokens)
    return tokens * (spec.padded_vocab / tp) * (4.0 * machine.constants.loss_passes / 2 / machine.memory_bytes_per_s)


def optimizer_update(machine: Machine, params: Array) -> Array:
    """Seconds to clip and apply Adam on `params` local parameters: memory traffic only."""
    return params * (machine.constants.optimizer_bytes / machine.memory_bytes_per_s)
