"""What a plan costs: seconds of every step, the predicted timeline, and memory by GPU and moment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cost_models.candidates import Candidates
from cost_models.engines.engine import MEGATRON, Engine
from cost_models.engines.machine import Machine
from cost_models.memory.memory import call_memory
from cost_models.memory.memory_terms import MemoryTerms
from cost_models.memory.moments import CallMemory, MemoryProfile, memory_profile
from cost_models.reallocation import reallocation_time, transfer_time
from cost_models.simulate import Durations, latency_s, simulate
from cost_models.terms import term
from cost_models.time.calls import call_time
from plans.batches import rank_samples
from plans.cluster import GIB
from plans.codec import sealed
from plans.graph import CallKind
from plans.plan import Estimate, ExecutionPlan
from plans.program import Program, Step, StepKind, compile_program
from plans.routes import is_routes, route_token_bytes
from plans.timeline import Timeline

BYTES_PER_TOKEN = {"sequences": 8.0}
SCORE_BYTES = 4.0


@dataclass(frozen=True, slots=True)
class CallCost:
    """Seconds of one call by term, and its memory."""

    terms: Mapping[str, float]
    memory: CallMemory

    def __post_init__(self) -> None:
        for name in self.terms:
            term(name)


@dataclass(frozen=True, kw_only=True)
class PlanCost:
    """Predicted cost of a plan. terms: call -> term -> seconds."""

    program: Program
    engine: Engine
    terms: Mapping[str, Mapping[str, float]]
    durations: Durations
    timeline: Timeline
    latency_s: float
    memory: MemoryProfile

    @property
    def iteration_s(self) -> float:
        """Steady-state seconds per iteration."""
        return self.timeline.period_s

    @property
    def fits(self) -> bool:
        """Whether every GPU and every host has the memory."""
        cluster = self.program.plan.cluster
        host = float(self.memory.host_bytes_by_node.max()) <= cluster.host_memory_gib * GIB
        return host and self.memory.peak_bytes <= cluster.gpu_memory_bytes

    @property
    def estimate(self) -> Estimate:
        """The figures that travel in the plan file."""
        plan = self.program.plan
        call = self.memory.peak_step
        estimate = Estimate(
            iteration_s=_figures(self.iteration_s),
            latency_s=_figures(self.latency_s),
            calls_s={name: _figures(seconds) for name, seconds in self.durations.seconds.items() if seconds > 1e-4},
            peak_gib=round(self.memory.peak_gib, 2),
            peak_at=f"{call}, rank {self.memory.peak_rank}",
            host_gib=round(float(self.memory.host_bytes_by_node.max()) / GIB, 2),
            engine=self.engine.name,
            of="",
        )
        return sealed(plan, estimate)


def _figures(value: float) -> float:
    """Four significant figures: more would promise an accuracy that no estimate has."""
    return float(f"{value:.4g}")


def cost_plan(
    plan: ExecutionPlan,
    engine: Engine = MEGATRON,
    *,
    known: Mapping[str, CallCost] | None = None,
    steps_s: Mapping[str, float] | None = None,
) -> PlanCost:
    """Cost a legal plan (`plans.checks`) under an engine.

    known: the cost of calls that another engine runs, or that is known already. steps_s: seconds of steps by name where
    they are known otherwise.
    """
    machine = engine.on(plan.cluster, plan.workload.dtype)
    program = compile_program(plan)
    costs = {p.call: (known or {}).get(p.call) or call_cost(plan, p.call, engine) for p in plan.calls}
    seconds = {call: sum(cost.terms.values()) for call, cost in costs.items()}
    for step in program.steps:
        if step.kind not in (StepKind.CALL, StepKind.LOAD, StepKind.OFFLOAD, StepKind.RELEASE):
            seconds[step.name] = _step_seconds(program, step, machine)
    durations = Durations(seconds | dict(steps_s or {}))
    memory = {call: cost.memory for call, cost in costs.items()}
    return PlanCost(
        program=program,
        engine=engine,
        terms={call: cost.terms for call, cost in costs.items()},
        durations=durations,
        timeline=simulate(program, durations),
        latency_s=latency_s(program, durations),
        memory=memory_profile(program, memory, machine.context_bytes),
    )


def call_cost(plan: ExecutionPlan, call: str, engine: Engine) -> CallCost:
    """Time and memory of one call of a plan under an engine."""
    planned, workload = plan.planned(call), plan.workload
    candidates = Candidates.of([(planned.mesh, planned.strategy)])
    machine = engine.running(workload.graph.call(call).kind).on(plan.cluster, workload.dtype)
    seconds = call_time(machine, workload, call, candidates)
    memory = call_memory(machine, workload, call, candidates)
    return CallCost({name: float(values[0]) for name, values in seconds.items()}, _call_memory(plan, call, memory))


def _step_seconds(program: Program, step: Step, machine: Machine) -> float:
    plan = program.plan
    if step.kind is StepKind.FUNCTION:
        rows = max(len(rows) for rows in rank_samples(plan, step.subject).values())
        return rows * plan.workload.graph.call(step.subject).seconds_per_sample
    if step.kind is StepKind.TRANSFER:
        messages = program.messages[step.subject, step.consumer]
        row_bytes = {keys: _row_bytes(plan, keys) for keys in {m.keys for m in messages}}
        sizes = [len(m.rows) * row_bytes[m.keys] for m in messages]
        return transfer_time(machine, [(m.source, m.target) for m in messages], sizes)
    assert step.kind is StepKind.REALLOCATE, step.kind
    copy = program.copy_of[step.subject]
    pair = program.homes[copy.role].layout, copy.layout
    return float(reallocation_time(machine, [pair])[0])


def _row_bytes(plan: ExecutionPlan, keys: Iterable[str]) -> float:
    """Bytes of a mean sample of tensors of a batch, which travel without padding."""
    tokens, graph = plan.workload.prompts.mean + plan.workload.responses.mean, plan.workload.graph

    def of_token(key: str) -> float:
        if is_routes(key):
            return float(route_token_bytes(plan.workload.spec(graph.producers[key])))
        return BYTES_PER_TOKEN.get(key, SCORE_BYTES)

    return sum(of_token(key) * tokens for key in keys)


def _call_memory(plan: ExecutionPlan, call: str, memory: MemoryTerms) -> CallMemory:
    terms = {name: float(values[0]) for name, values in memory.terms().items()}
    train = plan.workload.graph.call(call).kind is CallKind.TRAIN_STEP
    state = ("gradients", "masters", "optimizer")
    stays = train and bool(memory.state_stays[0])
    resident = ("communicators", *(name for name in ("routes",) if name in terms), *(state if stays else ()))
    transient = ("activations", "logits", "kv_cache", "workspace", "reserve", *(() if stays else state))
    return CallMemory(terms=terms, resident=resident, transient=transient, host=float(memory.host[0]))
