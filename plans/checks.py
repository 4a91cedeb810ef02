"""Named checks: every rule that joins several values of a plan. Each gives its numbers and a legal value.

A plan that passes them can be compiled, simulated and run. Memory is not here: whether a plan fits is the cost
model's answer (`realplan check` adds it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from plans.batches import unit_of
from plans.graph import CallKind, Edge
from plans.layout import default_split
from plans.model import ModelSpec
from plans.plan import ExecutionPlan, PlannedCall
from plans.problems import Path_, Problem
from plans.strategy import SETTINGS, ParallelStrategy
from plans.workload import Workload

CallCheck = Callable[[ExecutionPlan, PlannedCall, ModelSpec], Iterator[Problem]]


def check_plan(plan: ExecutionPlan) -> list[Problem]:
    """Every broken rule of a plan, in file order; empty for a legal plan."""
    problems = [
        problem.at(("calls", i))
        for i, planned in enumerate(plan.calls)
        for check in CALL_CHECKS
        for problem in check(plan, planned, plan.workload.spec(planned.call))
    ]
    return [*problems, *_order(plan)]


def sample_problems(workload: Workload) -> list[Problem]:
    """What no engine can do with the samples of a workload: responses without a token, models whose vocabulary or,
    where the workload does not insist (`allow_long`), whose context they outgrow.

    Rules apart from `check_plan`: they are about the workload, and no choice of layouts mends it.
    """
    return [*_responses(workload), *_contexts(workload), *_vocabularies(workload)]


def _responses(workload: Workload) -> Iterator[Problem]:
    if not workload.response_tokens:
        message = "response_tokens is 0: there is nothing to learn from"
        yield Problem("response", message, "response_tokens 1 or more", ("workload", "response_tokens"))


def _contexts(workload: Workload) -> Iterator[Problem]:
    path = ("workload", "response_tokens")
    sizes = f"{workload.prompt_tokens} + {workload.response_tokens}"
    for role, spec in workload.models.items():
        if spec.max_context < workload.tokens and not workload.allow_long:
            rest = spec.max_context - workload.prompt_tokens
            less = f"response_tokens {rest} or less" if rest > 0 else f"at most {spec.max_context} tokens in all"
            message = f"samples of {sizes} tokens, and `{role}` ({spec.name}) has a context of {spec.max_context}"
            yield Problem("context", message, f"{less}, or --allow-long to insist", path)


def _vocabularies(workload: Workload) -> Iterator[Problem]:
    """Every model reads the tokens of the one that generates them, or without one of the one that trains."""
    graph = workload.graph
    writers = [call.model for call in graph.model_calls if call.kind is CallKind.GENERATE]
    writer = next(iter([*writers, *graph.trainers, *graph.roles]), "")
    vocab = workload.models[writer].vocab if writer else 0
    for role in graph.roles:
        spec = workload.models[role]
        if spec.vocab < vocab:
            message = f"`{role}` ({spec.name}) knows {spec.vocab} tokens, fewer than the {vocab} of `{writer}`"
            hint = f"a model for `{role}` with the tokenizer of `{writer}` and {vocab} tokens or more"
            yield Problem("vocabulary", message, hint, ("workload", "models", role))


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return [*small, *(number // d for d in reversed(small) if d * d != number)]


def closest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`."""
    return min(divisors(number), key=lambda d: (abs(d - wanted), d))


def _problem(rule: str, key: str, message: str, hint: str) -> Problem:
    return Problem(rule, message, hint, (key,))


def mesh_size(plan: ExecutionPlan, planned: PlannedCall, spec: ModelSpec) -> Iterator[Problem]:
    """The product of the degrees is the number of GPUs of the mesh."""
    s, size = planned.strategy, planned.mesh.size
    if s.size != size:
        product = " x ".join(f"{k} {v}" for k, v in (("dp", s.dp), ("tp", s.tp), ("pp", s.pp), ("cp", s.cp)) if v > 1)
        rest = s.tp * s.pp * s.cp
        hint = f"d{size // rest} t{s.tp} p{s.pp}" if size % rest == 0 else f"d{size} t1 p1"
        yield _problem(
            "mesh-size",
            "strategy",
            f"{planned.call}: {product or 'dp 1'} = {s.size} but mesh "
            f"`{planned.mesh.text(plan.cluster)}` has {size} GPUs",
            hint,
        )


def tensor_parallel(plan: ExecutionPlan, planned: PlannedCall, spec: ModelSpec) -> Iterator[Problem]:
    """tp cuts whole query groups, and stays inside a node."""
    tp = planned.strategy.tp
    if spec.kv_heads % tp:
        legal = [d for d in divisors(spec.kv_heads) if plan.cluster.gpus_per_node % d == 0 or d <= planned.mesh.gpus]
        yield _problem(
            "kv-heads",
            "strategy",
            f"{planned.call}: tp {tp} does not divide the {spec.kv_heads} KV heads of {spec.name}",
            f"tp one of {legal}",
        )
    for what, extent in (*(("ffn", width) for width in spec.cut_widths), ("padded vocabulary", spec.padded_vocab)):
        if extent % tp:
            hint = f"tp {closest_divisor(extent, tp)}"
            message = f"{planned.call}: tp {tp} does not divide the {what} {extent} of {spec.name}"
            yield _problem("tp-divides", "strategy", message, hint)
    if planned.mesh.gpus % tp:
        yield _problem(
            "tp-in-node",
            "strategy",
            f"{planned.call}: tp {tp} does not divide the {planned.mesh.gpus} GPUs of the mesh on each node",
            f"tp one of {divisors(planned.mesh.gpus)}",
        )


def pipeline(plan: ExecutionPlan, planned: PlannedCall, spec: ModelSpec) -> Iterator[Problem]:
    """Every stage has a layer, chunks are equal; interleaving needs training, pp > 1 and full rounds."""
    s = planned.strategy
    if s.pp > spec.layers:
        message = f"{planned.call}: pp {s.pp} is more than the {spec.layers} layers of {spec.name}"
        yield _problem("layers", "strategy", message, f"pp {spec.layers} or less")
    elif s.vpp > 1 and spec.layers % (s.pp * s.vpp):
        message = (
            f"{planned.call}: {spec.layers} layers of {spec.name} do not divide into pp {s.pp} x vpp {s.vpp} chunks"
        )
        hint = f"leave out `v`, or pp x vpp {closest_divisor(spec.layers, s.pp * s.vpp)}"
        yield _problem("layers", "strategy", message, hint)
    yield from _split(planned.call, s, spec)
    if s.vpp > 1 and (_kind(plan, planned) is not CallKind.TRAIN_STEP or s.pp == 1):
        message = f"{planned.call}: vpp {s.vpp} needs a train_step with pp above 1"
        yield _problem("interleaving", "strategy", message, "leave out `v`")
    elif s.vpp > 1 and s.micro_batches % s.pp and not s.micro_batch_tokens:
        hint = f"micro_batches {max(1, round(s.micro_batches / s.pp)) * s.pp}"
        message = f"{planned.call}: interleaving needs micro_batches {s.micro_batches} to be a multiple of pp {s.pp}"
        yield _problem("interleaving", "micro_batches", message, hint)


def _split(call: str, s: ParallelStrategy, spec: ModelSpec) -> Iterator[Problem]:
    """A split of one's own has a number for every stage, and all layers."""
    split = s.layers_per_stage
    if not split:
        return
    hint = f"layers_per_stage {list(default_split(spec.layers, s.pp))}" if s.pp <= spec.layers else "another pp"
    if len(split) != s.pp:
        message = f"{call}: layers_per_stage has {len(split)} stages, pp is {s.pp}"
        yield _problem("split", "layers_per_stage", message, hint)
    elif sum(split) != spec.layers:
        message = f"{call}: layers_per_stage adds up to {sum(split)}, {spec.name} has {spec.layers} layers"
        yield _problem("split", "layers_per_stage", message, hint)
    elif s.vpp > 1:
        message = f"{call}: vpp {s.vpp} interleaves equal chunks and takes no layers_per_stage"
        yield _problem("split", "layers_per_stage", message, "leave out `v` or layers_per_stage")


def batch(plan: ExecutionPlan, planned: PlannedCall, spec: ModelSpec) -> Iterator[Problem]:
    """Samples of a pass divide over dp, then over micro-batches or groups in flight."""
    s, samples = planned.strategy, plan.workload.samples_per_step(planned.call)
    kind = _kind(plan, planned)
    unit = "minibatch" if kind is CallKind.TRAIN_STEP else "batch"
    if samples % s.dp:
        yield _problem(
            "batch",
            "strategy",
            f"{planned.call}: dp {s.dp} does not divide the {samples} samples of a {unit}",
            f"dp {closest_divisor(samples, s.dp)}",
        )
        return
    generates = kind is CallKind.GENERATE
    key = "micro_batches" if not generates else "waves" if s.waves > 1 else "groups"
    parts, share = getattr(s, key), samples // s.dp
    if generates and s.waves > 1 and s.groups > 1:
        share //= s.groups
    if share % parts:
        yield _problem(
            "batch",
            key,
            f"{planned.call}: {key} {parts} does not divide the {share} samples that a dp rank has of a {unit}",
            f"{key} {closest_divisor(share, parts)}",
        )


def slots(plan: ExecutionPlan, planned: PlannedCall, spec: ModelSpec) -> Iterator[Problem]:
    """Slots are samples in flight on a dp rank: no more than it has, and one for each group in flight."""
    s, share = planned.strategy, plan.workload.samples // planned.strategy.dp
    if not s.slots:
        return
    if s.waves > 1:
        message = f"{planned.call}: slots {s.slots} and waves {s.waves} say the same thing twice"
        yield _problem("slots", "waves", message, "leave out `waves`")
    if s.slots > share:
        message = f"{planned.call}: {s.slots} slots for the {share} samples of a dp rank"
        yield _problem("slots", "slots", message, f"slots {share} or less, or leave it out")
    if s.slots < s.groups:
        message = f"{planned.call}: {s.slots} slots do not fill {s.groups} groups in flight"
        yield _problem("slots", "slots", message, f"slots {s.groups} or more")


def token_bound(plan: ExecutionPlan, planned: PlannedCall, spec: ModelSpec) -> Iterator[Problem]:
    """A micro-batch that is bounded by tokens holds the longest sample, or pair of samples that must stay together."""
    s, unit = planned.strategy, unit_of(plan.workload, planned.call)
    if not s.micro_batch_tokens:
        return
    if s.micro_batches > 1:
        message = f"{planned.call}: micro_batches {s.micro_batches} and micro_batch_tokens {s.micro_batch_tokens}"
        yield _problem("token-bound", "micro_batches", f"{message} both cut the batch", "leave out one of them")
    longest = unit * plan.workload.tokens
    if s.micro_batch_tokens < longest:
        what = "pair" if unit > 1 else "sample"
        message = (
            f"{planned.call}: micro_batch_tokens {s.micro_batch_tokens} is less than the longest {what}, {longest}"
        )
        yield _problem(
            "token-bound", "micro_batch_tokens", f"{message} tokens", f"micro_batch_tokens {longest} or more"
        )


def sequence(plan: ExecutionPlan, planned: PlannedCall, spec: ModelSpec) -> Iterator[Problem]:
    """Sequence parallelism cuts tokens over tp. Packs are filled up, so that any number of tokens can be cut."""
    s = planned.strategy
    if s.sequence_parallel and s.tp == 1:
        message = f"{planned.call}: sequence_parallel needs tp above 1, it is {s.tp}"
        yield _problem("sequence-parallel", "sequence_parallel", message, "leave it out")


def kind_settings(plan: ExecutionPlan, planned: PlannedCall, spec: ModelSpec) -> Iterator[Problem]:
    """Settings that the kind of the call does not have keep their defaults."""
    kind, s = _kind(plan, planned), planned.strategy
    for name, setting in SETTINGS.items():
        value = getattr(s, name)
        if kind not in setting.kinds and value != setting.default:
            message = f"{planned.call}: {name} {value} does not apply to a call of kind {kind}"
            yield _problem(
                "kind", "strategy" if setting.letter else name, message, f"leave out `{setting.letter or name}`"
            )
    if kind is CallKind.GENERATE and s.groups > 1 and s.pp == 1:
        message = f"{planned.call}: groups {s.groups} in flight need a pipeline, pp is {s.pp}"
        yield _problem("groups", "groups", message, "groups 1")
    trained = plan.workload.graph.call(planned.call).model in plan.workload.graph.trainers
    if s.offload and trained and kind is not CallKind.TRAIN_STEP:
        message = f"{planned.call}: offload belongs to the training call of a trained model"
        yield _problem("offload", "offload", message, "leave it out; the copy is released after the call")


def experts(plan: ExecutionPlan, planned: PlannedCall, spec: ModelSpec) -> Iterator[Problem]:
    """Expert parallelism needs experts, in equal shares."""
    ep = planned.strategy.ep
    if ep > 1 and (not spec.experts or spec.experts % ep):
        message = f"{planned.call}: ep {ep} does not divide the {spec.experts} experts of {spec.name}"
        hint = f"ep one of {divisors(spec.experts)}" if spec.experts else "leave out `e`"
        yield _problem("experts", "strategy", message, hint)


CALL_CHECKS: tuple[CallCheck, ...] = (
    mesh_size,
    tensor_parallel,
    pipeline,
    batch,
    slots,
    token_bound,
    sequence,
    kind_settings,
    experts,
)


def _kind(plan: ExecutionPlan, planned: PlannedCall) -> CallKind:
    return plan.workload.graph.call(planned.call).kind


def _order(plan: ExecutionPlan) -> Iterator[Problem]:
    """A call stands after what it waits for in the same period, and before the training that makes newer weights than
    it reads; lag shifts a call's iteration to a later period."""
    position = {planned.call: i for i, planned in enumerate(plan.calls)}
    lag = {planned.call: planned.lag for planned in plan.calls}
    graph = plan.workload.graph
    for edge in (*graph.model_edges, *graph.version_ends):
        source, target, distance = edge.source, edge.target, edge.distance
        if source == target:
            continue
        if (lag[source] - distance, position[source]) < (lag[target], position[target]):
            continue
        path: Path_ = ("calls", position[target])
        ends = edge in graph.version_ends
        waits = _waits(edge, ends=ends)
        if lag[source] - distance == lag[target]:
            yield Problem("order", f"{waits} but stands before it", f"move `{source}` above `{target}`", path)
            continue
        first = position[source] < position[target]
        least = lag[source] - distance + (not first)
        message = f"{waits}, which lag {lag[source]} runs only in a later period (lag of `{target}`: {lag[target]})"
        other = "" if ends else f", or lag 0 for `{source}`"
        yield Problem("lag", message, f"lag {least} for `{target}`{other}", path)


def _waits(edge: Edge, *, ends: bool) -> str:
    """What an edge asks for, in words."""
    which = {0: "", 1: " of the iteration before"}.get(
        abs(edge.distance), f" of {abs(edge.distance)} iterations before"
    )
    if not ends:
        return f"`{edge.target}` waits for `{edge.source}`{which}"
    later = which.replace("before", "after")
    return f"`{edge.target}` makes newer weights than `{edge.source}`{later} must read"
