"""What a plan would cost under other circumstances: another network, batch, response length, GPU, or number of GPUs.

The plan itself is kept, but for bounds that its own samples would no longer fit (`refitted`). With another number of
GPUs every mesh and every dp degree grows (or shrinks) by the same factor, which is what an engineer would try first; a
new search may find better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from fractions import Fraction

from plans.batches import unit_of
from plans.checks import check_plan, divisors
from plans.cluster import MOST_GPUS, ClusterSpec, DeviceMesh, GpuSpec, check_mesh
from plans.errors import RealplanError, SpecError, nearest
from plans.graph import CallKind
from plans.lengths import Lengths, Percentiles
from plans.library import cluster_names, load_cluster, load_gpu
from plans.plan import ExecutionPlan, PlannedCall
from plans.problems import shortened
from plans.workload import SIZES

_CLUSTER = ("inter_node_gbps", "host_memory_gib")
_GPU = tuple(f.name for f in fields(GpuSpec) if f.name != "name")
CHANGES = ("gpus", "gpu", *SIZES, *_CLUSTER, *_GPU)
_EXAMPLES: Mapping[str, str] = {"gpus": "256", "gpu": "h200-141gb", "response_tokens": "4096", "inter_node_gbps": "200"}


def what_if(plan: ExecutionPlan, changes: Sequence[str]) -> ExecutionPlan:
    """The plan under `key=value` changes, all of them together (of two for one key the later counts); raises when the
    plan is not legal there."""
    values = dict(_parted(change) for change in changes)
    sizes = {key: _whole(key, value, *SIZES[key]) for key, value in values.items() if key in SIZES}
    speeds = {key: _number(key, value) for key, value in values.items() if key in (*_CLUSTER, *_GPU)}
    gpu = _gpu(values["gpu"]) if "gpu" in values else plan.cluster.gpu
    gpus = _whole("gpus", values["gpus"], 1, MOST_GPUS) if "gpus" in values else plan.cluster.size
    try:
        gpu = replace(gpu, **{key: value for key, value in speeds.items() if key in _GPU})  # type: ignore[arg-type]
        links = {key: value for key, value in speeds.items() if key in _CLUSTER}
        cluster = replace(plan.cluster, gpu=gpu, **links)  # type: ignore[arg-type]
        lengths = _rescaled(plan, sizes)
        workload = replace(plan.workload, **sizes, **lengths)  # type: ignore[arg-type]
    except SpecError as error:
        raise SpecError(f"--what-if {', '.join(changes)}: {error.message}", error.hint) from None
    plan = _fitting(_scaled(replace(plan, workload=workload, cluster=cluster), gpus))
    problems = check_plan(plan)
    if problems:
        raise SpecError(f"the plan is not legal under {', '.join(changes)}: {problems[0].message}", problems[0].hint)
    return replace(plan, estimate=None)


def refitted(before: ExecutionPlan, after: ExecutionPlan) -> list[str]:
    """What a what-if has changed in the calls of a plan so that they can take its samples, a line each."""
    found = []
    for old, new in zip(before.calls, after.calls, strict=True):
        bound, longest = old.strategy.micro_batch_tokens, new.strategy.micro_batch_tokens
        if bound != longest:
            found.append(f"{old.call}: micro_batch_tokens {bound} becomes {longest}, which the longest samples need")
        slots, fewer = old.strategy.slots, new.strategy.slots
        if slots != fewer:
            found.append(f"{old.call}: slots {slots} become {fewer}, all samples of a dp rank")
    return found


def _fitting(plan: ExecutionPlan) -> ExecutionPlan:
    """The plan with micro-batches that hold the longest sample (or pair), and no more slots than a dp rank has samples:
    the least that a change of sizes asks of it."""
    calls = []
    for planned in plan.calls:
        s, work = planned.strategy, plan.workload
        share = work.samples // s.dp
        longest = unit_of(work, planned.call) * work.tokens
        bound = max(s.micro_batch_tokens, longest) if s.micro_batch_tokens else 0
        slots = min(s.slots, share) if share >= s.groups else s.slots
        calls.append(replace(planned, strategy=replace(s, micro_batch_tokens=bound, slots=slots)))
    return replace(plan, calls=tuple(calls))


def _rescaled(plan: ExecutionPlan, sizes: dict[str, int]) -> dict[str, Percentiles]:
    """Measured lengths under another mean, which they take over from `sizes`."""
    found = {}
    for part in ("prompt", "response"):
        if getattr(plan.workload, f"{part}_lengths") and f"mean_{part}_tokens" in sizes:
            lengths: Lengths = getattr(plan.workload, f"{part}s")
            found[f"{part}_lengths"] = lengths.with_mean(sizes.pop(f"mean_{part}_tokens")).percentiles
    return found


def _parted(change: str) -> tuple[str, str]:
    key, equals, value = change.partition("=")
    if key not in CHANGES:
        raise SpecError(f"--what-if `{shortened(change)}` is not one of the known changes", nearest(key, CHANGES))
    if not equals or not value:
        raise SpecError(f"--what-if `{change}` has no value", f"write `{key}={_EXAMPLES.get(key, '<number>')}`")
    return key, value


def _gpu(name: str) -> GpuSpec:
    """A GPU kind, also by the name of a cluster that has it."""
    return load_cluster(name).gpu if name in cluster_names() else load_gpu(name)


def _number(key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise SpecError(f"--what-if {key}: `{shortened(value)}` is not a number", f"`{key}=200`, for example") from None
    if not math.isfinite(number) or number <= 0:
        raise SpecError(f"--what-if {key}: {value} is not a positive, finite number", f"`{key}=200`, for example")
    return number


def _whole(key: str, value: str, least: int, most: int) -> int:
    rule = f"--what-if {key}: {shortened(value)} is not a whole number from {least} to {most:,}"
    hint = f"`{key}={_EXAMPLES.get(key, max(least, 1))}`, for example"
    try:
        number = float(value)
    except ValueError:
        raise SpecError(rule, hint) from None
    if not least <= number <= most or number != int(number):  # nan fails the first comparison
        raise SpecError(rule, hint)
    return int(number)


def _scaled(plan: ExecutionPlan, gpus: int) -> ExecutionPlan:
    old = plan.cluster
    if gpus == old.size:
        return plan
    if gpus % old.gpus_per_node:
        raise SpecError(
            f"--what-if gpus={gpus}: not a whole number of nodes of {old.gpus_per_node} GPUs",
            f"`gpus={(gpus // old.gpus_per_node + 1) * old.gpus_per_node}`",
        )
    factor = Fraction(gpus, old.size)
    cluster = replace(old, nodes=gpus // old.gpus_per_node)
    grown = replace(plan, cluster=cluster)
    return replace(grown, calls=tuple(_grown(grown, planned, factor, old) for planned in plan.calls))


def _grown(plan: ExecutionPlan, planned: PlannedCall, factor: Fraction, old: ClusterSpec) -> PlannedCall:
    """The call on a mesh and with a dp of `factor` times the size. Slots stay as they are, micro-batches and waves
    keep their number of samples, so that a rank holds as many at a time as before."""
    s, cluster = planned.strategy, plan.cluster
    where = f"--what-if gpus={cluster.size} is {factor} of the {old.size} GPUs: `{planned.call}`"
    hint = f"search anew: `realplan search --gpus {cluster.size} ...`"
    dp = s.dp * factor
    if dp.denominator > 1:
        raise SpecError(f"{where} has dp {s.dp} (`{s.degrees}`), which cannot become {dp}", hint)
    try:
        mesh = _scaled_mesh(planned.mesh.ranks(old), factor, cluster)
    except SpecError as error:
        text = planned.mesh.text(old)
        raise SpecError(f"{where} on mesh `{text}` cannot have {factor} of it: {error.message}", hint) from None
    key = "waves" if plan.workload.graph.call(planned.call).kind is CallKind.GENERATE else "micro_batches"
    share = plan.workload.samples_per_step(planned.call) // int(dp) // s.groups
    parts = _parts(getattr(s, key) / factor, share, s.pp if s.vpp > 1 else 1)
    try:
        slots = min(s.slots, share * s.groups)
        strategy = replace(s, **{"dp": int(dp), "slots": slots, key: parts})  # type: ignore[arg-type]
    except RealplanError as error:
        raise SpecError(f"{where}: {error.message}", hint) from None
    return replace(planned, mesh=mesh, strategy=strategy)


def _scaled_mesh(ranks: range, factor: Fraction, cluster: ClusterSpec) -> DeviceMesh:
    """The mesh of the same share of the cluster; raises where no legal mesh is that share."""
    start, size, per_node = ranks.start * factor, len(ranks) * factor, cluster.gpus_per_node
    if start.denominator > 1 or size.denominator > 1 or (size > per_node and (start % per_node or size % per_node)):
        raise SpecError(f"GPUs {start} to {start + size} of the cluster are no mesh")
    nodes = max(1, int(size) // per_node)
    node, first = divmod(int(start), per_node)
    mesh = DeviceMesh(first_node=node, nodes=nodes, first_gpu=first, gpus=int(size) // nodes)
    check_mesh(mesh, cluster)
    return mesh


def _parts(wanted: Fraction, share: int, multiple: int) -> int:
    """Into how many equal parts a rank's `share` of samples goes: the least number that is enough, the most there is
    where none is; `multiple` is what it must be a multiple of."""
    legal = [parts for parts in divisors(share) if parts % multiple == 0]
    return next((parts for parts in legal if parts >= wanted), legal[-1] if legal else max(1, int(wanted)))
