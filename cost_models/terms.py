"""The registry of time terms: what every term of a call is called, what it waits for, and where its formula is from.

Training, scoring and generation name their terms here and nowhere else; explanations read the resources. A term is
added in two files: its record here, and the formula that fills it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from cost_models.candidates import Array
from plans.errors import SpecError, nearest


class Resource(StrEnum):
    """What a time term waits for."""

    COMPUTE = "compute"
    MEMORY_BANDWIDTH = "memory bandwidth"
    NETWORK = "network"
    BUBBLE = "pipeline bubble"
    HOST = "host launch"
    IMBALANCE = "imbalance"
    HOST_LINK = "host memory link"
    FUNCTION = "Python function"


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A part of a call's time. source: paper or place that the formula is taken from. pipelined: the resource where the
    call runs in a pipeline, if another."""

    name: str
    resource: Resource
    source: str
    unit: str = "s"
    pipelined: Resource | None = None


def _of(resource: Resource, sources: Mapping[str, str]) -> list[Term]:
    return [Term(name=name, resource=resource, source=source) for name, source in sources.items()]


_RING = "ring bytes and tree latency (`engines.collectives`)"
TERMS: Mapping[str, Term] = {
    term.name: term
    for term in (
        *_of(
            Resource.COMPUTE,
            {
                "linears": "2 m n k FLOPs per product, three products in training (Megatron-LM 2019)",
                "attention": "4 tokens x length x heads x head_dim, half of it causal (FlashAttention-2, section 3.1)",
                "recompute": "the layer's forward again, or its attention core (Korthikanti et al. 2022, section 5)",
                "prefill": "a forward pass over the prompts",
            },
        ),
        Term(
            name="head_and_loss",
            resource=Resource.COMPUTE,
            pipelined=Resource.IMBALANCE,
            source="vocabulary-parallel head and cross entropy (Megatron-LM 2019, section 3): what the last stage takes"
            " beyond the others",
        ),
        Term(
            name="decode_head",
            resource=Resource.COMPUTE,
            source="head, sampling and bookkeeping of a decode step (`generation.decode_step`)",
        ),
        *_of(
            Resource.MEMORY_BANDWIDTH,
            {
                "streaming": "norms, residuals, activation function: bytes passed (Korthikanti et al. 2022, section 4)",
                "accumulation": "gradients of a micro-batch added up in their fp32 buffer",
                "optimizer": "clipping and Adam over masters, two moments, gradient and weight",
                "decode_linears": "weights of a layer read once per step (Pope et al. 2022, section 2)",
                "decode_attention": "keys and values read once per step (Pope et al. 2022, section 3.3)",
            },
        ),
        *_of(
            Resource.NETWORK,
            {
                "tensor_parallel": f"two all-reduces of hidden states each way (Megatron-LM 2019, figure 4); {_RING}",
                "context_parallel": "keys and values to cp ranks: a ring (Liu et al. 2023), or gathered (Llama 3)",
                "expert_parallel": "two all-to-alls each way (Lepikhin et al. 2020, GShard)",
                "weight_gather": "weights gathered twice, gradients scattered once (Rajbhandari et al. 2020, ZeRO)",
                "gradient_reduce": f"all-reduce, or reduce-scatter with a sharded optimizer, over dp x cp; {_RING}",
                "parameter_gather": f"all-gather of updated weights over dp x cp; {_RING}",
                "pipeline_p2p": "an activation and a gradient per slot (Narayanan et al. 2021, section 2.2)",
                "decode_tensor_parallel": f"two small all-reduces per layer and step, mostly latency; {_RING}",
                "decode_p2p": "hidden states between stages per group and step",
            },
        ),
        *_of(Resource.BUBBLE, {"bubble": "fill and drain of 1F1B (Narayanan et al. 2021, section 2.2)"}),
        *_of(
            Resource.IMBALANCE,
            {"imbalance": "work of the busiest dp rank beyond the mean (`plans.batches`, Graham 1969)"},
        ),
        *_of(
            Resource.HOST,
            {
                "gaps": "idle time between the kernels of a layer that no launch-ahead hides",
                "host": "launch time of a layer beyond its GPU time",
                "overhead": "schedule per micro-batch, bookkeeping per optimizer step",
                "call": "framework per call",
                "decode_kernels": "idle time between the kernels of a decode layer",
                "decode_host": "launch time of a decode layer beyond its GPU time",
            },
        ),
        *_of(Resource.HOST_LINK, {"offload": "weights or optimizer state over PCIe"}),
    )
}
"""Every term by name, grouped by resource."""


def term(name: str) -> Term:
    """The record of a term; an unknown one is an error."""
    if name not in TERMS:
        raise SpecError(f"unknown time term `{name}`", nearest(name, list(TERMS)))
    return TERMS[name]


class Terms(Mapping[str, Array]):
    """An ordered mapping of registered terms -> seconds, shape [candidates] each. Terms add up to the call's time."""

    def __init__(self, seconds: Mapping[str, Array]) -> None:
        self._seconds = {term(name).name: value for name, value in seconds.items()}

    def __getitem__(self, name: str) -> Array:
        return self._seconds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._seconds)

    def __len__(self) -> int:
        return len(self._seconds)

    @property
    def total_s(self) -> Array:
        """Seconds of the call, shape [candidates]."""
        total = np.zeros_like(next(iter(self._seconds.values())))
        for seconds in self._seconds.values():
            total = total + seconds
        return total
