"""What the version of torch means for generation on GPUs: whether its KV cache lies in blocks, as plans are priced, or
in whole rows."""

from __future__ import annotations

from plans.cluster import GIB
from plans.errors import RealplanError
from plans.graph import CallKind
from plans.kvcache import BLOCK_TOKENS, LEAST_TORCH, PAGED_TORCH, cached_tokens, release, slots_per_replica
from plans.layout import Layout, model_units
from plans.plan import ExecutionPlan

BLOCK_ENGINE = "megatron"
"""The engine whose estimates price a cache in blocks (`cost_models/library/engines.json`)."""


def check_cache(plan: ExecutionPlan, torch: str) -> tuple[str, ...]:
    """Words about the KV caches of a plan that take more room under this version of torch than the plan is priced with.

    Half precision on GPUs reads blocks in place, in a kernel that torch has from `PAGED_TORCH` on; before, a slot holds
    a row at its longest, and no prompt is shared. Raises RealplanError where the version is below `LEAST_TORCH`, and
    where rows cannot fit: with the weights of the call's rank, or with all else that the plan's estimate has at its
    peak.
    """
    if plan.cluster.gpu.name == "cpu" or plan.workload.element_bytes == 4:
        return ()
    if release(torch) < LEAST_TORCH:
        raise RealplanError(
            f"torch {torch} has no packed attention for half precision on GPUs (`varlen_attn` with a scale)",
            f"torch {'.'.join(map(str, LEAST_TORCH))} or later",
        )
    if release(torch) >= PAGED_TORCH:
        return ()
    calls = [call.name for call in plan.workload.graph.calls if call.kind is CallKind.GENERATE]
    return tuple(words for call in calls if (words := _rows(plan, call, torch)))


def _rows(plan: ExecutionPlan, call: str, torch: str) -> str:
    """What is said of a call whose cache is rows; empty where they take no more than blocks."""
    rows, blocks = (cache_bytes(plan, call, block_tokens=size) for size in (0, BLOCK_TOKENS))
    if rows <= blocks:
        return ""
    newer = f"torch {'.'.join(map(str, PAGED_TORCH))}"
    sizes = f"{rows / GIB:.2f} GiB of a GPU; blocks, which {newer} has and plans count on, take {blocks / GIB:.2f}"
    rest, memory = _beside(plan, call, blocks), plan.cluster.gpu_memory_bytes
    if rows + rest > memory:
        raise RealplanError(
            f"`{call}`: under torch {torch} its KV cache is whole rows, {sizes}; with the {rest / GIB:.2f} GiB beside"
            f" them the rows do not fit the {memory / GIB:g} GiB of a GPU",
            f"{newer} or later, or fewer `slots` in this call",
        )
    return f"`{call}`: under torch {torch} its KV cache is whole rows, {sizes}: the rows may not fit"


def cache_bytes(plan: ExecutionPlan, call: str, *, block_tokens: int) -> int:
    """Bytes of a generate call's KV cache on a rank of its fullest stage; block_tokens: 0 for a row for each slot."""
    workload, strategy, layout = plan.workload, plan.planned(call).strategy, plan.layout(call)
    slots = slots_per_replica(workload.samples // layout.dp, strategy.slots, strategy.waves)
    groups = min(strategy.groups, slots)
    sizes = workload.prompt_tokens, max(workload.response_tokens, 1), workload.group_size
    tokens = cached_tokens(slots, groups, *sizes, block_tokens)
    width = layout.spec.latent_width or layout.spec.key_value_width // layout.tp
    return max(layout.stage_layers) * width * workload.element_bytes * tokens


def _beside(plan: ExecutionPlan, call: str, blocks: int) -> int:
    """Bytes that lie beside a call's cache for certain: the weights of its rank; and where the plan's estimate has its
    peak in this call, all of it but the blocks."""
    held = (
        max(_weights(plan.layout(call), stage) for stage in range(plan.layout(call).pp)) * plan.workload.element_bytes
    )
    estimate = plan.estimate
    if estimate is None or estimate.engine != BLOCK_ENGINE or not estimate.peak_at.startswith(f"{call},"):
        return held
    return max(held, int(estimate.peak_gib * GIB) - blocks)


def _weights(layout: Layout, stage: int) -> int:
    """Elements of a rank of a stage."""
    rank = next(rank for rank, place in layout.places.items() if place.pp == stage)
    units = {unit.name: unit for unit in model_units(layout.spec)}
    held = [units[name] for name in layout.rank_units(rank)]
    return sum(unit.sharded for unit in held) // layout.tp + sum(unit.replicated for unit in held)
