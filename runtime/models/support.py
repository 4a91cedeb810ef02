"""What this runtime can run and what it cannot, without torch, so that it is said before anything starts."""

from __future__ import annotations

from plans.errors import RealplanError, SpecError
from plans.layout import Layout
from plans.model import Head, Position
from plans.plan import ExecutionPlan
from runtime.algorithms import GROUPED, OFFLINE, TRAINABLE

ACTIVATIONS = ("silu", "gelu", "relu")
DTYPES = ("bf16", "fp32")


def check_supported(plan: ExecutionPlan) -> None:
    """Raise RealplanError for an algorithm, a type or a model under a layout that a run would fail on."""
    workload = plan.workload
    name = workload.graph.name
    if name not in TRAINABLE:
        raise RealplanError(
            f"this runtime does not train `{name}`; the plan can be searched, costed and drawn",
            f"one of {', '.join(TRAINABLE)}",
        )
    if name in GROUPED and workload.group_size < 2:
        raise RealplanError(
            f"{name} compares the samples of one prompt, and the plan's group_size is {workload.group_size}",
            "plan with group_size 2 or more",
        )
    if name in OFFLINE:
        _check_examples(plan)
    if workload.dtype not in DTYPES:
        raise RealplanError(
            f"dtype {workload.dtype} needs loss scaling, which this runtime does not have",
            f"dtype {' or '.join(DTYPES)}",
        )
    for planned in plan.calls:
        try:
            check_runnable(plan.layout(planned.call))
        except SpecError as error:
            raise RealplanError(f"{planned.call}: {error.message}", error.hint) from None


def _check_examples(plan: ExecutionPlan) -> None:
    """A sample per given response, and both responses of a pair in one micro-batch."""
    workload, columns = plan.workload, OFFLINE[plan.workload.graph.name]
    if workload.group_size != len(columns):
        raise RealplanError(
            f"{workload.graph.name} has {len(columns)} responses per prompt ({', '.join(columns)}), the plan's "
            f"group_size is {workload.group_size}",
            f"plan with group_size {len(columns)}",
        )
    for call in workload.graph.trainers.values():
        s = plan.planned(call).strategy
        size = workload.samples // workload.minibatches // s.dp // s.micro_batches
        if size % len(columns):
            raise RealplanError(
                f"{call}: micro-batches of {size} samples cut pairs of chosen and rejected responses apart",
                "fewer micro_batches, minibatches or dp ranks, so that a micro-batch is even",
            )


def check_runnable(layout: Layout) -> None:
    """Raise SpecError unless this runtime can run the architecture under the layout."""
    spec, stages = layout.spec, layout.pp * layout.vpp
    rules = (
        (
            spec.position is Position.ROPE,
            f"position encoding `{spec.position}`",
            "only rotary positions run: a model of the Llama or Qwen family",
        ),
        (
            spec.activation in ACTIVATIONS,
            f"activation `{spec.activation}`",
            f"one of {', '.join(ACTIVATIONS)}",
        ),
        (spec.norms_per_layer == 2, f"{spec.norms_per_layer} norms per layer", "a model with 2 norms per layer"),
        (not spec.experts, f"{spec.experts} experts", "only dense models run"),
        (
            not (spec.tied_embeddings and spec.head is Head.VALUE),
            "a value head tied to its embedding",
            "tied_embeddings false: a value head has weights of its own",
        ),
        (layout.cp == 1, f"context parallel degree {layout.cp}", "leave out `c`: only degree 1 runs"),
        (
            spec.kv_heads % layout.tp == 0,
            f"kv_heads {spec.kv_heads}, not a multiple of tp {layout.tp}",
            f"tp one of {[t for t in range(1, spec.kv_heads + 1) if spec.kv_heads % t == 0]}",
        ),
        (
            spec.layers % stages == 0,
            f"{spec.layers} layers, not a multiple of pp x vpp {stages}",
            f"pp x vpp one of {[p for p in range(1, spec.layers + 1) if spec.layers % p == 0]}",
        ),
        (layout.vpp == 1 or layout.pp > 1, f"vpp {layout.vpp} without a pipeline", "leave out `v`"),
    )
    for runs, what, hint in rules:
        if not runs:
            raise SpecError(f"model `{spec.name}` has {what}", hint)
