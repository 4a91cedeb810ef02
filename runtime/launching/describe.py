"""A plan in words before it runs: the arithmetic of its batch, and what each rank will do."""

from __future__ import annotations

from collections.abc import Iterator

from plans.algorithms import tensor_kind
from plans.graph import CallKind
from plans.kvcache import slots_per_replica
from plans.plan import ExecutionPlan
from plans.program import Program, Step, StepKind, compile_program
from plans.reallocation import reallocation
from plans.render import rank_ranges
from plans.routes import route_token_bytes, routed_tokens
from plans.runfile import RunFile
from plans.workload import Workload


def restart_words(run: RunFile) -> Iterator[str]:
    """Keys that a run whose ranks another launcher has started does not use, and what starts it again there."""
    keys = [f"restarts={run.restarts}"] * (run.restarts > 0) + [f"on_loss={run.on_loss}"] * (run.on_loss != "stop")
    if keys:
        yield (
            f"not used where another launcher starts the ranks: {', '.join(keys)}; torchrun --max-restarts, or a "
            "requeued slurm job (sbatch --requeue), goes on from the newest checkpoint, --resume under another plan too"
        )


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
        share = samples // s.dp
        cut = f" / {s.micro_batches} = {share // s.micro_batches} per micro-batch"
        if s.micro_batch_tokens:
            cut = f" = {share} in micro-batches of at most {s.micro_batch_tokens} tokens"
        if generates:
            cut = f" = {share}, {slots_per_replica(share, s.slots, s.waves)} at a time"
            cut += f" in {s.groups} groups in flight" if s.groups > 1 else ""
        yield (
            f"  {planned.call:<16} {what} {samples} / dp {s.dp}{cut}  on {planned.mesh.text(plan.cluster)}, {s.degrees}"
        )


def base_words(plan: ExecutionPlan, run: RunFile) -> Iterator[str]:
    """Where the plan counts the base of a model with adapters once, and the run file makes two of it."""
    program = compile_program(plan)
    roles = {copy.name: copy.role for copy in program.copies}
    for copy, owner in program.base_owner.items():
        ours, theirs = roles[copy], roles[owner]
        if run.weights_of(ours) != run.weights_of(theirs):
            yield (
                f"note: `{ours}` starts from other weights than `{theirs}`, so that they cannot share them: more memory"
                " is needed than the plan says"
            )


def program_words(plan: ExecutionPlan) -> Iterator[str]:
    """The steps of one period, rank by rank, with what they are predicted to take and the bytes that they move in all;
    ranks that do the same share their lines."""
    program = compile_program(plan)
    figures = {step.name: _figures(program, step) for step in program.steps}
    groups: dict[tuple[Step, ...], list[int]] = {}
    for rank in range(plan.cluster.size):
        groups.setdefault(program.projection(rank), []).append(rank)
    for steps, ranks in groups.items():
        yield f"rank{'s' if len(ranks) > 1 else ''} {rank_ranges(ranks)}" + ("" if steps else ": idle")
        for step in steps:
            kind = f" ({plan.workload.graph.call(step.subject).kind})" if step.kind is StepKind.CALL else ""
            lag = f"  {step.lag} period{'s' * (step.lag > 1)} later" if step.lag else ""
            yield f"  {step.name + kind:<44}{figures[step.name]}{lag}".rstrip()


def step_bytes(program: Program, step: Step) -> int:
    """Bytes that a reallocation moves between ranks, or a transfer of samples of full length."""
    plan = program.plan
    if step.kind is StepKind.TRANSFER:
        messages = program.messages[step.subject, step.consumer]
        return sum(len(m.rows) * sum(row_bytes(key, plan.workload) for key in m.keys) for m in messages)
    if step.kind is StepKind.REALLOCATE:
        copy = program.copy_of[step.subject]
        home = program.homes[copy.role].layout
        return reallocation(home, copy.layout, plan.cluster.gpus_per_node).elements * plan.workload.element_bytes
    return 0


def row_bytes(key: str, workload: Workload) -> int:
    """Most bytes of one sample of a tensor of the graph: tokens in int64, routes, or float32 numbers."""
    kind = tensor_kind(key)
    if kind == "routes":
        return routed_tokens(workload.tokens) * route_token_bytes(workload.spec(workload.graph.producers[key]))
    if kind == "sequences":
        return 8 * workload.tokens
    return 4 if kind == "rewards" else 4 * workload.response_tokens


def _figures(program: Program, step: Step) -> str:
    estimate = program.plan.estimate
    words = []
    if estimate is not None and step.name in estimate.calls_s:
        words.append(f"{estimate.calls_s[step.name]:.4g} s")
    if size := step_bytes(program, step):
        unit, name = next(
            (u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes")) if size >= u
        )
        words.append(f"{size / unit:.4g} {name}")
    return ", ".join(words)
