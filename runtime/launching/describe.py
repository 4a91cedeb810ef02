"""A plan in words before it runs: the arithmetic of its batch, and what each rank will do."""

from __future__ import annotations

from collections.abc import Iterator

from plans.graph import CallKind
from plans.plan import ExecutionPlan
from plans.program import Step, StepKind, compile_program


def batch_words(plan: ExecutionPlan) -> Iterator[str]:
    """Batch, group size, minibatch, and per call the micro-batch."""
    w = plan.workload
    yield (
        f"batch {w.batch_size} prompts x group size {w.group_size} = {w.samples} samples per iteration; "
        f"minibatch {w.samples // w.minibatches} samples ({w.minibatches} optimizer steps); "
        f"{w.prompt_tokens} + {w.response_tokens} tokens"
    )
    for planned in plan.calls:
        s, kind = planned.strategy, w.graph.call(planned.call).kind
        samples = w.samples_per_step(planned.call)
        what = "minibatch" if kind is CallKind.TRAIN_STEP else "batch"
        generates = kind is CallKind.GENERATE
        part, parts = ("group in flight", s.groups * s.waves) if generates else ("micro-batch", s.micro_batches)
        yield (
            f"  {planned.call:<16} {what} {samples} / dp {s.dp} / {parts} = {samples // s.dp // parts} per {part}"
            f"  on {planned.mesh.text(plan.cluster)}, {s.degrees}"
        )


def program_words(plan: ExecutionPlan) -> Iterator[str]:
    """The steps of one period, rank by rank; ranks that do the same share their lines."""
    program = compile_program(plan)
    groups: dict[tuple[Step, ...], list[int]] = {}
    for rank in range(plan.cluster.size):
        groups.setdefault(program.projection(rank), []).append(rank)
    for steps, ranks in groups.items():
        yield f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" + ("" if steps else ": idle")
        for step in steps:
            kind = f" ({plan.workload.graph.call(step.subject).kind})" if step.kind is StepKind.CALL else ""
            yield f"  {step.name}{kind}" + (f"  one period later (lag {step.lag})" if step.lag else "")
