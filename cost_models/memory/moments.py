"""Memory by GPU and moment: what lies on every rank while each step of an iteration runs.

A moment is one step of the program. On a rank lie its CUDA context, the resident bytes of every copy and call
placed on it, the other copies that are alive at that moment, and what the step itself needs: a call its temporaries, a
reallocation its buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plans.cluster import GIB
from plans.program import Copy, Program, Step, StepKind
from plans.reallocation import buffer_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CallMemory:
    """Bytes per GPU of one call on its fullest rank, by term; `resident` and `transient` name the terms that stay
    and the terms that live while the call runs, beside the weights, which belong to the copy."""

    terms: Mapping[str, float]
    resident: tuple[str, ...]
    transient: tuple[str, ...]
    host: float

    @property
    def resident_bytes(self) -> float:
        """Bytes that stay between calls, weights apart."""
        return sum(self.terms[name] for name in self.resident)

    @property
    def transient_bytes(self) -> float:
        """Bytes that live while the call runs, weights apart."""
        return sum(self.terms[name] for name in self.transient)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One step and the bytes on every rank while it runs; `terms` are those of its fullest rank, largest first."""

    step: Step
    bytes_by_rank: NDArray[np.float64]
    terms: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGroup:
    """Ranks of equal memory: their peak, the step in which it is, and its bytes by term, largest first."""

    ranks: tuple[int, ...]
    peak_bytes: float
    step: str
    terms: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class MemoryProfile:
    """Memory of a plan. `peak_terms` are the bytes by term on the fullest rank at its peak."""

    moments: tuple[Moment, ...]
    groups: tuple[RankGroup, ...]
    peak_bytes: float
    peak_rank: int
    peak_step: str
    peak_terms: Mapping[str, float]
    host_bytes_by_node: NDArray[np.float64]

    @property
    def peak_gib(self) -> float:
        """Largest memory on any GPU, GiB."""
        return self.peak_bytes / GIB

    @property
    def by_rank(self) -> NDArray[np.float64]:
        """Peak bytes of every rank."""
        stacked: NDArray[np.float64] = np.stack([m.bytes_by_rank for m in self.moments]).max(axis=0)
        return stacked


def memory_profile(program: Program, calls: Mapping[str, CallMemory], context_bytes: float) -> MemoryProfile:
    """Walk one steady-state iteration and add up what is alive."""
    plan = program.plan
    resident = np.zeros(plan.cluster.size)
    used = sorted({r for planned in plan.calls for r in plan.ranks(planned.call)})
    resident[used] += context_bytes
    for copy in program.copies:
        resident[list(copy.layout.ranks)] += _base_bytes(program, calls, copy)
        if copy.home and not copy.offload:
            resident[list(copy.layout.ranks)] += _copy_bytes(program, calls, copy)
    for planned in plan.calls:
        resident[plan.ranks(planned.call)] += calls[planned.call].resident_bytes
    moments = []
    for step in program.steps:
        if step.kind in (StepKind.CALL, StepKind.REALLOCATE):
            bytes_by_rank = _at(program, calls, step, resident)
            terms = _terms_at(program, calls, step, int(bytes_by_rank.argmax()), context_bytes)
            moments.append(Moment(step=step, bytes_by_rank=bytes_by_rank, terms=terms))
    best = max(moments, key=lambda m: float(m.bytes_by_rank.max()))
    rank = int(best.bytes_by_rank.argmax())
    return MemoryProfile(
        moments=tuple(moments),
        groups=tuple(_groups(program, calls, moments, context_bytes)),
        peak_bytes=float(best.bytes_by_rank[rank]),
        peak_rank=rank,
        peak_step=best.step.name,
        peak_terms=best.terms,
        host_bytes_by_node=_host(program, calls),
    )


def _groups(
    program: Program, calls: Mapping[str, CallMemory], moments: list[Moment], context_bytes: float
) -> Iterator[RankGroup]:
    """Ranks that are alike at every moment, in the order of their first; idle ones are left out."""
    stacked = np.stack([moment.bytes_by_rank for moment in moments])
    _, first, inverse = np.unique(stacked, axis=1, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    for number in np.argsort(first):
        rank = int(first[number])
        at = int(stacked[:, rank].argmax())
        if stacked[at, rank] > 0:
            step = moments[at].step
            yield RankGroup(
                ranks=tuple(np.flatnonzero(inverse == number).tolist()),
                peak_bytes=float(stacked[at, rank]),
                step=step.name,
                terms=_terms_at(program, calls, step, rank, context_bytes),
            )


def _at(
    program: Program, calls: Mapping[str, CallMemory], step: Step, resident: NDArray[np.float64]
) -> NDArray[np.float64]:
    now = resident.copy()
    for copy in program.copies:
        if step.copy == copy.name or _alive(program, copy.name, step):
            if copy.home and not copy.offload:
                continue
            now[list(copy.layout.ranks)] += _copy_bytes(program, calls, copy)
    if step.kind is StepKind.CALL:
        now[program.plan.ranks(step.subject)] += calls[step.subject].transient_bytes
    else:
        now[list(step.ranks)] += _buffers(program, calls, step)
    return now


def _copy_bytes(program: Program, calls: Mapping[str, CallMemory], copy: Copy) -> float:
    """Bytes of a copy's weights per rank: of the adapters where it has some; none where all lies in another copy."""
    shares = program.base_owner.get(copy.name, copy.name) != copy.name
    return 0.0 if shares and not copy.layout.spec.lora else calls[copy.calls[0]].terms["weights"]


def _base_bytes(program: Program, calls: Mapping[str, CallMemory], copy: Copy) -> float:
    """Bytes per rank of the frozen base of a copy with adapters, where it does not lie in another copy."""
    shares = program.base_owner.get(copy.name, copy.name) != copy.name
    return 0.0 if shares else calls[copy.calls[0]].terms.get("base", 0.0)


def _buffers(program: Program, calls: Mapping[str, CallMemory], step: Step) -> float:
    """Bytes of buffers on every rank that takes part in a reallocation."""
    copy = next(copy for copy in program.copies if copy.name == step.copy)
    return float(buffer_bytes(calls[copy.calls[0]].terms["weights"]))


def _alive(program: Program, copy: str, step: Step) -> bool:
    """Whether a copy that is not at home exists while `step` runs: after its reallocation, before its release."""
    at = program.steps.index(step)
    begins = [i for i, s in enumerate(program.steps) if s.copy == copy and s.kind is StepKind.REALLOCATE]
    ends = [i for i, s in enumerate(program.steps) if s.copy == copy and s.kind is StepKind.RELEASE]
    return bool(begins) and begins[0] <= at <= ends[-1]


def _terms_at(
    program: Program, calls: Mapping[str, CallMemory], step: Step, rank: int, context_bytes: float
) -> dict[str, float]:
    """Bytes by term on one rank at one step, largest first."""
    terms = {"context": context_bytes}
    for copy in program.copies:
        here = (copy.home and not copy.offload) or step.copy == copy.name or _alive(program, copy.name, step)
        if here and rank in copy.layout.ranks:
            terms[f"weights {copy.name}"] = _copy_bytes(program, calls, copy)
        if rank in copy.layout.ranks:
            terms[f"base {copy.name}"] = _base_bytes(program, calls, copy)
    if step.kind is StepKind.REALLOCATE and rank in step.ranks:
        terms[f"buffers {step.copy}"] = _buffers(program, calls, step)
    for planned in program.plan.calls:
        if rank in program.plan.ranks(planned.call):
            names = list(calls[planned.call].resident)
            names += (
                calls[planned.call].transient if step.kind is StepKind.CALL and step.subject == planned.call else ()
            )
            for name in names:
                terms[f"{name} {planned.call}"] = calls[planned.call].terms[name]
    return {k: v for k, v in sorted(terms.items(), key=lambda item: -item[1]) if v > 0}


def _host(program: Program, calls: Mapping[str, CallMemory]) -> NDArray[np.float64]:
    plan = program.plan
    by_node = np.zeros(plan.cluster.nodes)
    for planned in plan.calls:
        for node in range(planned.mesh.first_node, planned.mesh.first_node + planned.mesh.nodes):
            by_node[node] += calls[planned.call].host * planned.mesh.gpus
    return by_node
