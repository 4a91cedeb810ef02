"""Constants: what tells one implementation of the same arithmetic from another; and the library that holds them.

A constant belongs to an engine, a GPU kind and a precision, never to a measurement. `library/engines.json` holds
`engines`, by name (what each is, can do and keeps in memory: `engines.engine`), and `entries`, each with the engine,
GPU and precision it is for (`*`: any), an `origin` and the constants it sets; the entries that match are laid over one
another from the general to the special.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.resources import files
from typing import Any

from plans.errors import SpecError, nearest

DEFAULT_ENGINE = "megatron"
TABLE_SUFFIX = ".json"
"""Cost tables end so; the name of an engine that one calibrates is its path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Constants of one engine on one GPU kind in one precision. Fractions are of vendor peaks.

    Measured kernels
      measured_kernels: GEMM, fused attention, the reading of the KV cache and collectives inside a node take their time
        from the GPU's kernel table (`kernels`) where it has them; the efficiencies below answer elsewhere.
      throttle: seconds that a stream of matrix kernels takes beyond measured ones that run alone, per second of its
        FLOPs at vendor peak (clocks under the power limit, caches shared with neighbours).

    Arithmetic
      gemm_efficiency: share of peak matrix throughput that a large GEMM sustains.
      gemm_half_extent: m, n or k at which a GEMM's efficiency falls to half, elements (tiles that are not full).
      backward_gemm_ratio: time of dgrad and wgrad together over that of the forward GEMM. With measured kernels their
        shapes are looked up, and half of this ratio multiplies the two.
      attention_efficiency: share of peak of the attention core, forward.
      attention_backward_ratio: its backward over its forward time (fused: 2.5 times the FLOPs, at a lower rate).
      flash_attention: fused causal kernel; otherwise scores are materialised and nothing is saved by causality.
      memory_efficiency: share of HBM bandwidth that streaming kernels reach.
      kv_efficiency: share of HBM bandwidth in reading the KV cache.
      hidden_passes: reads and writes of a [tokens, hidden] tensor per layer and forward (norms, residuals, dropout).
      ffn_passes: the same of [tokens, ffn] (activation function, gate).
      softmax_passes: the same of the score matrix (unfused attention only).
      response_head: head and loss run on response tokens alone, not on those of prompts.
      loss_passes: the same of fp32 logits, twice those of the forward. loss_backward_ratio: backward over forward.

    Host
      host_forward_layer_s, host_backward_layer_s, host_decode_layer_s: time in which the CPU launches one layer;
        a layer takes the longer of this and its GPU time. Zero with CUDA graphs.
      inference_host_ratio, prefill_host_ratio: launch time of a forward layer that keeps no gradients, and of one in
        the prefill of a generation, over host_forward_layer_s.
      layer_gap_s: idle time between the kernels of a layer that no launch-ahead hides, per forward; recomputation has
        it again and backward twice. decode_layer_s: the same per layer and decode step. decode_experts_s: beside it in
        a layer with experts: router, choice, sorting of rows by expert, gates.
      decode_step_s: sampling and bookkeeping per decode step. decode_row_s: the same per sequence.
      sampling_bytes: memory traffic of sampling per sequence and vocabulary entry of the rank.
      burst_steps: decode steps between two looks at which sequences have ended; 0: a look at every step. burst_alone:
        the same on a replica of one stage that shares no experts with others, and newcomers' prompts are a part of a
        decode step there; 0: burst_steps, and prompts have passes of their own.
      shares_prompts: a prompt is computed once for all samples of its group. prefill_tokens: prompts of newcomers are
        packed into passes of as many tokens; 0: a pass per group of sequences in flight.
      micro_batch_s: schedule overhead per micro-batch. step_s: per optimizer step. call_s: per call.

    Communication
      link_efficiency, link_latency_s, link_hop_s, link_half_bytes: collectives inside a node (`collectives`).
      reduce_scatter_efficiency, all_gather_efficiency, send_efficiency: bandwidth of these and of sends inside a node
        over that of an all-reduce (gloo's differ several times; NCCL's hardly).
      network_efficiency, network_latency_s, network_half_bytes: collectives between nodes.
      tensor_overlap: share of tensor-parallel communication hidden behind GEMMs.
      gathers_context: the keys of all cp ranks are gathered before the attention core, and nothing hides it; otherwise
        they go around a ring while it runs.
      data_overlap: share of gradient reduction that may hide behind the backward pass; of sharded weights' gathers too.
      gather_overlap: share of the gather after a sharded optimizer step that may hide behind the next forward pass.
      pipeline_overlap: share of pipeline send/receive that is hidden.
      pipeline_efficiency: share of one GPU's network bandwidth that a send to the next stage reaches.
      splits_sends: tp ranks send a part each and gather it inside the node, also without sequence parallelism
        (Narayanan et al. 2021, section 4.1; DeepSpeed).
      gradient_bytes: bytes per gradient element as reduced.
      shards_weights: weights are sharded over dp and gathered layer by layer (ZeRO-3, FSDP).
      message_s: overhead per message of reallocation and transfer.

    Optimizer
      optimizer_bytes: memory traffic of the update per parameter (masters, two Adam moments, gradient, weight).
      accumulate_bytes: memory traffic per parameter and micro-batch of adding gradients up in their buffer.
      offload_efficiency: share of PCIe bandwidth in copies from and to host memory.
    """

    measured_kernels: bool = False
    throttle: float = 0.0
    gemm_efficiency: float = 0.75
    gemm_half_extent: float = 64.0
    backward_gemm_ratio: float = 2.0
    attention_efficiency: float = 0.5
    attention_backward_ratio: float = 3.0
    flash_attention: bool = True
    memory_efficiency: float = 0.8
    kv_efficiency: float = 0.6
    hidden_passes: float = 12.0
    ffn_passes: float = 3.0
    softmax_passes: float = 6.0
    response_head: bool = False
    loss_passes: float = 6.0
    loss_backward_ratio: float = 1.0
    host_forward_layer_s: float = 4e-4
    host_backward_layer_s: float = 6e-4
    host_decode_layer_s: float = 5e-4
    inference_host_ratio: float = 1.0
    prefill_host_ratio: float = 1.0
    layer_gap_s: float = 2e-5
    decode_layer_s: float = 0.0
    decode_experts_s: float = 0.0
    decode_step_s: float = 1e-3
    decode_row_s: float = 0.0
    sampling_bytes: float = 0.0
    burst_steps: float = 0.0
    burst_alone: float = 0.0
    shares_prompts: bool = False
    prefill_tokens: float = 0.0
    micro_batch_s: float = 5e-4
    step_s: float = 0.02
    call_s: float = 0.05
    link_efficiency: float = 0.75
    link_latency_s: float = 6e-6
    link_hop_s: float = 3e-6
    link_half_bytes: float = 5e6
    reduce_scatter_efficiency: float = 1.0
    all_gather_efficiency: float = 1.0
    send_efficiency: float = 1.0
    network_efficiency: float = 0.8
    network_latency_s: float = 2e-5
    network_half_bytes: float = 1e7
    tensor_overlap: float = 0.0
    gathers_context: bool = False
    data_overlap: float = 0.0
    gather_overlap: float = 0.0
    pipeline_overlap: float = 0.0
    pipeline_efficiency: float = 0.6
    splits_sends: bool = True
    gradient_bytes: float = 4.0
    shards_weights: bool = False
    message_s: float = 2e-5
    optimizer_bytes: float = 30.0
    accumulate_bytes: float = 0.0
    offload_efficiency: float = 0.8


def engine_names() -> tuple[str, ...]:
    """Names in the library."""
    return tuple(engine_records())


def engine_records() -> dict[str, dict[str, Any]]:
    """The library's record of every engine by name: `about`, what it `can` do, its `memory` habits."""
    records: dict[str, dict[str, Any]] = _library()["engines"]
    return records


def load_constants(name: str, gpu: str, dtype: str = "bf16") -> Constants:
    """The constants of a named engine on a GPU kind (`GpuSpec.name`) in a precision (`bf16` and `fp16` are one)."""
    if name not in engine_names():
        raise SpecError(f"unknown engine `{name}`", nearest(name, list(engine_names())))
    wanted = {"engine": name, "gpu": gpu, "precision": "bf16" if dtype == "fp16" else dtype}
    matching = [e for e in _library()["entries"] if all(e[key] in ("*", value) for key, value in wanted.items())]
    matching.sort(key=lambda entry: [entry[key] != "*" for key in ("engine", "gpu", "precision")].count(True))
    constants: dict[str, Any] = {}
    for entry in matching:
        constants |= entry["constants"]
    return Constants(**constants)


@lru_cache(maxsize=1)
def _library() -> dict[str, Any]:
    path = files("cost_models") / "library" / "engines.json"
    known = {f.name for f in fields(Constants)}
    library: dict[str, Any] = json.loads(path.read_text("utf-8"))
    for entry in library["entries"]:
        for key in entry["constants"]:
            if key not in known:
                raise SpecError(f"{path}: unknown constant `{key}`", nearest(key, sorted(known)))
    return library
