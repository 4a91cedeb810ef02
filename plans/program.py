"""The program: a plan as the ordered steps of one period. `simulate`, memory by moment and the runtime all read it.

Every rank runs its projection of one total order, so no controller is needed and no two ranks can wait for each other.
A call with lag k runs iteration p - k in period p; the first k periods skip it (prologue), and after the last
iteration k more periods finish it (epilogue).

Order of events for each call, in plan order: reallocate the weights it needs -> load offloaded weights -> the
call -> function calls on its outputs -> transfers of everything made -> offload -> release of its copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

from plans.algorithms import GREEDY, tensor_kind
from plans.batches import Message, batch_transfers, can_move
from plans.errors import PlanError
from plans.graph import CallKind
from plans.layout import Layout
from plans.plan import ExecutionPlan, PlannedCall


class StepKind(StrEnum):
    """What a step does."""

    REALLOCATE = "reallocate"
    LOAD = "load"
    CALL = "call"
    FUNCTION = "function"
    TRANSFER = "transfer"
    OFFLOAD = "offload"
    RELEASE = "release"


@dataclass(frozen=True)
class Copy:
    """A model's weights in one layout. A home copy lives for the whole run; another lives from its reallocation
    before the first of `calls` to its release after the last, and never across the training of its role, which would
    leave it behind. `offload`: it waits in host memory between calls."""

    name: str
    role: str
    layout: Layout
    home: bool
    calls: tuple[str, ...]
    offload: bool


@dataclass(frozen=True)
class Step:
    """One step of a period and the ranks that take part. `subject` is the call it serves (for a transfer the
    producer, with `consumer`), `copy` the weights it touches."""

    kind: StepKind
    subject: str
    ranks: tuple[int, ...]
    lag: int = 0
    copy: str = ""
    consumer: str = ""

    @property
    def name(self) -> str:
        """A short name for timelines and error messages."""
        if self.kind is StepKind.TRANSFER:
            return f"transfer {self.subject} -> {self.consumer}"
        if self.kind in (StepKind.CALL, StepKind.FUNCTION):
            return self.subject
        return f"{self.kind} {self.copy}"


@dataclass(frozen=True)
class Program:
    """Steps of one period in total order, the copies they use, and by (producer, consumer) the messages of an iteration
    whose samples are all as long as each other; the lengths of an iteration say which messages it really has."""

    plan: ExecutionPlan
    copies: tuple[Copy, ...]
    steps: tuple[Step, ...]
    messages: Mapping[tuple[str, str], tuple[Message, ...]] = field(hash=False)

    @cached_property
    def copy_of(self) -> dict[str, Copy]:
        """Call -> the copy of the weights it runs on."""
        return {call: copy for copy in self.copies for call in copy.calls}

    @cached_property
    def homes(self) -> dict[str, Copy]:
        """Trained role -> its home copy."""
        trainers = self.plan.workload.graph.trainers
        return {role: self.copy_of[call] for role, call in trainers.items()}

    @cached_property
    def base_owner(self) -> dict[str, str]:
        """Copy -> the copy in whose storage its frozen weights lie, for every copy of a model with adapters and for
        those of frozen models that hold the same slices of the same architecture on the same ranks: the first of them.

        That the reference starts from the weights of the actor is taken for granted here; where the run file says
        otherwise, each has its own. What waits in host memory shares with nobody.
        """
        trainers, found = self.plan.workload.graph.trainers, dict[str, str]()
        able = [c for c in self.copies if c.layout.spec.lora or not (c.role in trainers or c.offload)]
        for copy in able:
            alike = [other for other in able if other.layout.same_base(copy.layout)]
            if any(other.layout.spec.lora for other in alike):
                found[copy.name] = alike[0].name
        return found

    @property
    def max_lag(self) -> int:
        """Periods of prologue and epilogue."""
        return max((planned.lag for planned in self.plan.calls), default=0)

    def unrolled(self, iterations: int, first: int = 0) -> Iterator[tuple[Step, int]]:
        """Every step of a run of iterations [first, iterations) in total order, with its iteration."""
        for period in range(first, iterations + self.max_lag):
            for step in self.steps:
                if first <= period - step.lag < iterations:
                    yield step, period - step.lag

    def projection(self, rank: int) -> tuple[Step, ...]:
        """The steps that a rank takes part in."""
        return tuple(step for step in self.steps if rank in step.ranks)


def compile_program(plan: ExecutionPlan) -> Program:
    """The program of a legal plan (`plans.checks`)."""
    copies = _copies(plan)
    messages: dict[tuple[str, str], tuple[Message, ...]] = {}
    steps: list[Step] = []
    placed: set[str] = set()
    held_back: list[tuple[str, list[Step]]] = []
    for planned in plan.calls:
        held_back = _send_due(plan, held_back, planned, steps)
        copy = next(c for c in copies if planned.call in c.calls)
        users = [p.call for p in plan.calls if p.call in copy.calls]
        steps += _before(plan, copy, planned.call, planned.lag, first=users[0] == planned.call)
        steps.append(Step(StepKind.CALL, planned.call, tuple(plan.ranks(planned.call)), planned.lag, copy.name))
        placed.add(planned.call)
        made = [planned.call, *_functions(plan, placed, planned.call)]
        for name in made[1:]:
            steps.append(Step(StepKind.FUNCTION, name, tuple(plan.ranks(planned.call)), planned.lag))
            placed.add(name)
        for name in made:
            sent = {c: found for c, found in batch_transfers(plan, name).items() if can_move(plan, name, c)}
            messages |= {(name, consumer): found for consumer, found in sent.items()}
            transfers = [_transfer(plan, name, consumer, planned.lag) for consumer in sent]
            if name == planned.call:
                steps += transfers
            else:
                held_back.append((name, transfers))
        steps += _after(copy, planned.call, planned.lag, last=users[-1] == planned.call)
    for _, transfers in held_back:
        steps += transfers
    program = Program(plan, copies, tuple(steps), messages)
    _check_versions(program)
    return program


def scoring_program(program: Program) -> Program:
    """The steps of a program that generate responses and score them, and no other: what an evaluation runs. Greedy
    baselines of the algorithm are left out."""
    graph = program.plan.workload.graph
    scores = [key for key in graph.producers if tensor_kind(key) == "rewards" and not key.endswith(GREEDY)]
    needed, waiting = set[str](), [graph.producers[key] for key in scores]
    while waiting:
        call = waiting.pop()
        if call not in needed:
            needed |= {call, graph.host(call)}
            waiting += [graph.producers[key] for key in graph.call(call).inputs if key in graph.producers]
    used = {program.copy_of[call].name for call in needed if call in program.copy_of}

    def serves(step: Step) -> bool:
        if step.kind in (StepKind.CALL, StepKind.FUNCTION, StepKind.TRANSFER):
            return step.subject in needed and (not step.consumer or step.consumer in needed)
        return step.copy in used

    steps = tuple(replace(step, lag=0) for step in sorted(filter(serves, program.steps), key=lambda step: step.lag))
    return replace(program, steps=steps)


def _check_versions(program: Program) -> None:
    """Raise PlanError unless every call reads the weights that its graph says: those that as many trainings have made
    as there were iterations before, in generation `staleness` fewer."""
    graph, copies = program.plan.workload.graph, {copy.name: copy for copy in program.copies}
    trainings: dict[str, int] = dict.fromkeys(graph.trainers, 0)
    held: dict[str, int | None] = {}
    for step, iteration in program.unrolled(2 + graph.staleness + program.max_lag):
        copy = copies.get(step.copy)
        if copy is None or copy.role not in trainings:
            continue
        if step.kind is StepKind.REALLOCATE:
            held[copy.name] = trainings[copy.role]
        elif step.kind is StepKind.RELEASE:
            held[copy.name] = None
        elif step.kind is StepKind.CALL and graph.call(step.subject).kind is CallKind.TRAIN_STEP:
            trainings[copy.role] += 1
        elif step.kind is StepKind.CALL:
            behind = graph.staleness * (graph.call(step.subject).kind is CallKind.GENERATE)
            wanted, found = max(0, iteration - behind), trainings[copy.role] if copy.home else held.get(copy.name)
            if found != wanted:
                what = "weights that are not there" if found is None else f"the weights after {found} trainings"
                message = f"{step.subject} of iteration {iteration} would read {what}; its graph says after {wanted}"
                raise PlanError(message, "another order or lag: `realplan check` names the rule")


def _send_due(
    plan: ExecutionPlan, held_back: list[tuple[str, list[Step]]], coming: PlannedCall, steps: list[Step]
) -> list[tuple[str, list[Step]]]:
    """Send what functions made right before the first call that reads it, in the order of the plan: a function runs on
    the CPU while its ranks go on to other calls. A reader that lags comes after everything of its iteration, so it
    waits for the end of the period at most. Gives what stays back."""
    graph, left = plan.workload.graph, []
    for name, transfers in held_back:
        if any(key in graph.call(coming.call).inputs for key in graph.call(name).outputs):
            steps += transfers
        else:
            left.append((name, transfers))
    return left


def _copies(plan: ExecutionPlan) -> tuple[Copy, ...]:
    """Group calls of a role that hold the same slices. A trained role's other copies serve calls that read the same
    version: those of one lag on one side of the training call in the period."""
    graph = plan.workload.graph
    position = {planned.call: i for i, planned in enumerate(plan.calls)}
    groups: list[tuple[str, Layout, bool, tuple[int, bool], list[str], bool]] = []
    ordered = sorted(graph.model_calls, key=lambda c: c.kind is not CallKind.TRAIN_STEP)
    for call in ordered:
        layout, planned = plan.layout(call.name), plan.planned(call.name)
        home = call.kind is CallKind.TRAIN_STEP or call.model not in graph.trainers
        trainer = graph.trainers.get(call.model, call.name)
        moment = planned.lag, position[call.name] > position[trainer]
        for role, other, is_home, when, calls, _ in groups:
            if role == call.model and other.same_weights(layout) and (is_home or when == moment):
                calls.append(call.name)
                break
        else:
            frozen = call.model not in graph.trainers
            groups.append((call.model, layout, home, moment, [call.name], frozen and planned.strategy.offload))
    return tuple(
        Copy(f"{role}@{calls[0]}", role, layout, home, tuple(calls), offload)
        for role, layout, home, _, calls, offload in groups
    )


def _before(plan: ExecutionPlan, copy: Copy, call: str, lag: int, *, first: bool) -> list[Step]:
    if copy.offload:
        return [Step(StepKind.LOAD, call, copy.layout.ranks, lag, copy.name)]
    if copy.home or not first:
        return []
    trainer = plan.workload.graph.trainers[copy.role]
    ranks = tuple(sorted({*plan.ranks(trainer), *copy.layout.ranks}))
    return [Step(StepKind.REALLOCATE, call, ranks, lag, copy.name)]


def _after(copy: Copy, call: str, lag: int, *, last: bool) -> list[Step]:
    if copy.offload:
        return [Step(StepKind.OFFLOAD, call, copy.layout.ranks, lag, copy.name)]
    if copy.home or not last:
        return []
    return [Step(StepKind.RELEASE, call, copy.layout.ranks, lag, copy.name)]


def _functions(plan: ExecutionPlan, placed: set[str], call: str) -> list[str]:
    """Function calls hosted by `call` whose inputs all exist now, in graph order."""
    graph = plan.workload.graph
    ready = list(placed)
    found: list[str] = []
    for candidate in graph.calls:
        if candidate.kind is not CallKind.FUNCTION or plan.workload.graph.host(candidate.name) != call:
            continue
        if all(key in graph.sources or graph.producers[key] in [*ready, *found] for key in candidate.inputs):
            found.append(candidate.name)
    return found


def _transfer(plan: ExecutionPlan, producer: str, consumer: str, lag: int) -> Step:
    ranks = {*plan.ranks(plan.workload.graph.host(producer)), *plan.ranks(plan.workload.graph.host(consumer))}
    return Step(StepKind.TRANSFER, producer, tuple(sorted(ranks)), lag, consumer=consumer)
