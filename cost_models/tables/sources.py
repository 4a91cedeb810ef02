"""Where the seconds of a plan come from: measured, interpolated between measurements, or analytic; and how far beyond
the measured sizes they reach.

Engines that go by measured kernels (`measured`) are asked kernel by kernel; an engine of a cost table by the sizes of
its blocks (`cost_sources`). Sizes beyond the measured ones by more than `REACH` count as analytic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from cost_models.candidates import Array, Candidates
from cost_models.estimate import PlanCost
from cost_models.tables.cost_sources import REACH, cost_sources
from cost_models.tables.interpolation import Answer, Source
from cost_models.time import measured, operations
from cost_models.time.engines import TABLE_SUFFIX, load_engine
from cost_models.time.inference import ForwardPass, forward_terms
from cost_models.time.machine import Machine
from plans.graph import CallKind
from plans.model import Head, ModelSpec
from plans.workload import Workload

MIXED = ("bubble", "recompute", "prefill")
"""Terms that repeat others: they come from where those come from."""


@dataclass(frozen=True)
class Sources:
    """Seconds by source, and the largest ratio of a size to the nearest measured one (1: none is beyond)."""

    seconds: Mapping[Source, float] = field(default_factory=dict)
    beyond: float = 1.0

    @property
    def shares(self) -> dict[str, float]:
        """Share by source, as a plan's provenance states it."""
        total = sum(self.seconds.values()) or 1.0
        return {source.name.lower(): round(self.seconds.get(source, 0.0) / total, 3) for source in Source}

    def scaled(self, seconds: float) -> Sources:
        """The same shares of other seconds."""
        total = sum(self.seconds.values()) or 1.0
        return Sources({source: value / total * seconds for source, value in self.seconds.items()}, self.beyond)


ANALYTIC = Sources({Source.ANALYTIC: 1.0})


def plan_sources(cost: PlanCost) -> Sources:
    """Sources of the seconds of all calls of a plan."""
    if cost.engine.endswith(TABLE_SUFFIX):
        shares = cost_sources(cost)
        return Sources({source: shares[source.name.lower()] for source in Source})
    return together(call_sources(cost, call) for call in cost.terms)


def together(parts: Iterable[Sources]) -> Sources:
    """The sum of several."""
    seconds, beyond = dict.fromkeys(Source, 0.0), 1.0
    for part in parts:
        beyond = max(beyond, part.beyond)
        for source, value in part.seconds.items():
            seconds[source] += value
    return Sources(seconds, beyond)


def call_sources(cost: PlanCost, call: str) -> Sources:
    """Sources of the seconds of one call."""
    plan, terms = cost.program.plan, cost.terms[call]
    machine = Machine(
        plan.cluster, load_engine(cost.engine, plan.cluster.gpu.name, plan.workload.dtype), plan.workload.dtype
    )
    if machine.kernels is None:
        return ANALYTIC.scaled(sum(terms.values()))
    planned, kind = plan.planned(call), plan.workload.graph.call(call).kind
    one = Candidates.of([(planned.mesh, planned.strategy)])
    known = {
        CallKind.TRAIN_STEP: _training,
        CallKind.INFERENCE: _inference,
        CallKind.GENERATE: _generation,
    }[kind](machine, plan.workload, call, one)
    return _of_terms(terms, known)


def _of_terms(terms: Mapping[str, float], known: Mapping[str, Sources]) -> Sources:
    """Sources of terms: those known, analytic for the rest, and the mean of these for the mixed ones."""
    plain = together(known.get(n, ANALYTIC).scaled(s) for n, s in terms.items() if n not in MIXED or n in known)
    repeated = sum(seconds for name, seconds in terms.items() if name in MIXED and name not in known)
    return together([plain, plain.scaled(repeated)])


def _training(machine: Machine, workload: Workload, call: str, one: Candidates) -> dict[str, Sources]:
    samples = workload.samples / workload.minibatches / (one.dp * one.micro_batches)
    return _layer(machine, workload.spec(call), one, samples * workload.tokens / one.cp, workload.tokens, backward=True)


def _inference(machine: Machine, workload: Workload, call: str, one: Candidates) -> dict[str, Sources]:
    samples = workload.samples / (one.dp * one.micro_batches)
    spec, tokens = workload.spec(call), samples * workload.tokens / one.cp
    return _layer(machine, spec, one, tokens, workload.tokens, backward=False)


def _generation(machine: Machine, workload: Workload, call: str, one: Candidates) -> dict[str, Sources]:
    """Prefill by its own terms; decoding half way through the responses."""
    spec, passes = workload.spec(call), np.maximum(one.groups * one.waves, one.micro_batches)
    prompts = ForwardPass(spec, workload.samples, workload.prompt_tokens, head_tokens=1.0, scored=False)
    prompt_tokens = workload.samples * workload.prompt_tokens / (one.dp * passes * one.cp)
    prefill = {name: float(values[0]) for name, values in forward_terms(machine, prompts, one, passes).items()}
    known = _layer(machine, spec, one, prompt_tokens, workload.prompt_tokens, backward=False)
    rows = np.maximum(workload.samples / (one.dp * one.groups * one.waves), 1.0)
    length = np.full_like(rows, workload.prompt_tokens + max(1.0, workload.response_tokens / 2))
    kv_heads = np.maximum(spec.kv_heads / one.tp, 1.0)
    read = measured.decode_attention(machine, spec.head_dim, rows, length, kv_heads)
    return {
        "prefill": _of_terms(prefill, known),
        "decode_linears": _gemms(machine, spec, one, rows, backward=False),
        "decode_attention": _of_answers([(read, 1.0)]),
        "decode_tensor_parallel": _collective(machine, one, rows * spec.hidden * machine.element_bytes, cut=False),
    }


def _layer(
    machine: Machine, spec: ModelSpec, one: Candidates, tokens: Array, length: float, *, backward: bool
) -> dict[str, Sources]:
    """Sources of the terms of a forward (and backward) pass over `tokens` tokens per rank."""
    found = {
        "linears": _gemms(machine, spec, one, tokens, backward=backward),
        "tensor_parallel": _collective(
            machine, one, tokens * spec.hidden * machine.element_bytes, cut=bool(one.sequence_parallel[0])
        ),
    }
    if machine.engine.flash_attention:
        lengths = np.full_like(tokens, length)
        core = measured.attention(machine, spec.head_dim, tokens, lengths, spec.heads / one.tp)
        found["attention"] = _of_answers([(core, 1.0)])
    if spec.head is Head.LM:
        found["head_and_loss"] = _head(machine, spec, one, tokens)
    return found


def _gemms(machine: Machine, spec: ModelSpec, one: Candidates, tokens: Array, *, backward: bool) -> Sources:
    answers = []
    for g in operations.layer_gemms(spec, tokens, one.tp, one.ep):
        n, k = np.asarray(g.n, dtype=np.float64), np.asarray(g.k, dtype=np.float64)
        shapes = [(g.m, n, k), (g.m, k, n), (k, n, g.m)] if backward else [(g.m, n, k)]
        answers += [(_gemm(machine, *shape), float(np.max(g.count))) for shape in shapes]
    return _of_answers(answers)


def _gemm(machine: Machine, m: Array, n: Array, k: Array) -> Answer:
    return measured.gemm(machine, m, n, k, np.ones_like(m * n * k))


def _head(machine: Machine, spec: ModelSpec, one: Candidates, tokens: Array) -> Sources:
    """The head's product, and the loss, which is analytic."""
    product = _gemm(machine, tokens, spec.padded_vocab / one.tp, np.array(float(spec.hidden)))
    loss = float(operations.loss(machine, spec, tokens, one.tp)[0])
    return together([_of_answers([(product, 1.0)]), ANALYTIC.scaled(loss)])


def _collective(machine: Machine, one: Candidates, message: Array, *, cut: bool) -> Sources:
    """The all-reduce of a tp group, or the two operations that it is cut into; measured inside a node."""
    inside = one.tensor_group[1] == one.tp
    names = ("reduce_scatter", "all_gather") if cut else ("all_reduce",)
    assert machine.kernels is not None
    if (
        not inside.all()
        or not np.isin(one.tp, measured.RANKS).all()
        or "all_reduce_node" not in machine.kernels.entries
    ):
        return ANALYTIC
    return _of_answers([(measured.collective(machine, name, message, one.tp), 1.0) for name in names])


def _of_answers(answers: Iterable[tuple[Answer, float]]) -> Sources:
    """Seconds of answers, each so many times, by their source."""
    parts = []
    for answer, times in answers:
        beyond = float(np.max(answer.beyond))
        source = Source.ANALYTIC if beyond > REACH else Source(int(np.max(answer.source)))
        parts.append(Sources({source: times * float(np.max(answer.value))}, beyond))
    return together(parts)
