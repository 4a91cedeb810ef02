"""A plan's cost as text: time by call and term and what binds, memory by group of ranks and moment. 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

from cost_models.checkpoint import checkpoint_cost
from cost_models.estimate import PlanCost
from cost_models.memory.moments import RankGroup
from cost_models.provenance.sources import Sources
from cost_models.validation.error_band import ErrorBand
from planner.explanation.binding import BindingTerm, by_resource
from planner.text import PROSE_WIDTH, wrapped
from plans.cluster import GIB
from plans.render import rank_ranges

CALLS_PER_TABLE = 6
BAR = 20
SHOWN_SHARE = 0.002
"""Terms below this share of every call are added up as `others`."""


def render_cost(
    cost: PlanCost, sources: Sources, band: ErrorBand, binding: Sequence[BindingTerm], misfits: Sequence[str] = ()
) -> str:
    """Everything that `realplan estimate` prints; `misfits` are lines on what does not fit in memory."""
    seconds = (
        f"{cost.iteration_s:.4g} s per iteration, 80 % band {band.low_s:.3g} to {band.high_s:.3g} s "
        f"(one iteration alone: {cost.latency_s:.4g} s)"
    )
    lines = [
        *wrapped(seconds),
        *misfits,
        *_origin(cost, sources, band),
        "",
        *_times(cost),
        "",
        *_binding(cost, binding),
        "",
        *_memory(cost),
        *_checkpoint(cost),
    ]
    return "\n".join(lines)


def _origin(cost: PlanCost, sources: Sources, band: ErrorBand) -> Iterator[str]:
    yield from wrapped(f"engine {cost.engine.name}; band: {band.origin}")
    shares = [f"{share:.0%} {name}" for name, share in sources.shares.items()]
    reach = f", sizes up to {sources.beyond:.1f}x beyond the measured ones" if sources.beyond > 1.05 else ""
    yield from wrapped(f"seconds of the calls: {', '.join(shares)}{reach}")


def _times(cost: PlanCost) -> Iterator[str]:
    """Seconds by term and call, and of the steps between the calls."""
    calls = [planned.call for planned in cost.program.plan.calls]
    for start in range(0, len(calls), CALLS_PER_TABLE):
        yield from _time_table(cost, calls[start : start + CALLS_PER_TABLE])
    between = [(name, s) for name, s in cost.durations.seconds.items() if name not in cost.terms and s > 1e-4]
    if between:
        yield ""
        yield "between the calls, seconds:"
        yield from (f"  {name[:67]:67}{seconds:>11.4g}" for name, seconds in between)


def _time_table(cost: PlanCost, calls: Sequence[str]) -> Iterator[str]:
    totals = {call: sum(cost.terms[call].values()) for call in calls}
    large: list[str] = []
    sums: dict[str, float] = {}
    for call in calls:
        for name, seconds in cost.terms[call].items():
            sums[name] = sums.get(name, 0.0) + seconds
            if name not in large and seconds > SHOWN_SHARE * totals[call]:
                large.append(name)
    heads = [call.rsplit("_", 1) for call in calls]
    yield f"{'seconds by term':24}" + "".join(f"{head[0][:8]:>9}" for head in heads)
    yield f"{'':24}" + "".join(f"{head[-1][:8] if len(head) > 1 else '':>9}" for head in heads)
    for name in sorted(large, key=lambda name: -sums[name]):
        yield f"  {name[:22]:22}" + _cells(cost.terms[call].get(name, 0.0) for call in calls)
    others = [sum(s for name, s in cost.terms[call].items() if name not in large) for call in calls]
    if any(others):
        yield f"  {'others':22}" + _cells(others)
    yield f"{'all':24}" + _cells(totals.values())
    yield f"{'share of an iteration':24}" + "".join(f"{totals[call] / cost.iteration_s:>9.0%}" for call in calls)


def _cells(values: Iterable[float]) -> str:
    return "".join(f"{value:>9.3g}" if value else f"{'.':>9}" for value in values)


def _binding(cost: PlanCost, terms: Sequence[BindingTerm]) -> Iterator[str]:
    """The resources of the critical path, and its largest terms."""
    shares = [f"{name} {s / cost.iteration_s:.0%}" for name, s in by_resource(tuple(terms)).items()]
    yield from wrapped(f"the critical path waits for: {', '.join(shares)}")
    largest = [f"{t.term} of {t.step} {t.seconds:.3g} s" for t in terms[:3]]
    yield from wrapped(f"bounding terms: {'; '.join(largest)}")


def _memory(cost: PlanCost) -> Iterator[str]:
    memory, cluster = cost.memory, cost.program.plan.cluster
    capacity = cluster.gpu.memory_gib
    yield f"memory: peak {memory.peak_gib:.1f} of {capacity:g} GiB on rank {memory.peak_rank}, in {memory.peak_step}"
    for moment in memory.moments:
        peak = float(moment.bytes_by_rank.max()) / GIB
        yield f"  {moment.step.name[:44]:44}{peak:>8.1f} GiB  " + "#" * round(BAR * min(1.0, peak / capacity))
    yield "by ranks, GiB at their peak:"
    for group in memory.groups:
        yield from _rank_group(group)
    host = float(memory.host_bytes_by_node.max()) / GIB
    yield f"host memory: {host:.0f} of {cluster.host_memory_gib:g} GiB on the fullest node"


def _checkpoint(cost: PlanCost) -> Iterator[str]:
    found = checkpoint_cost(cost.program.plan, cost.engine)
    share, part = found.copy_s / cost.iteration_s, found.rank_bytes / GIB
    yield from wrapped(
        f"checkpoint: {found.bytes / GIB:.1f} GiB; an iteration before one takes {found.copy_s:.2g} s more "
        f"({share:.2g} of it), in which a rank copies up to {part:.1f} GiB to its host"
    )


def _rank_group(group: RankGroup) -> Iterator[str]:
    heading = f"ranks {rank_ranges(group.ranks)}: {group.peak_bytes / GIB:.1f} in {group.step}"
    yield from textwrap.wrap(heading, PROSE_WIDTH, initial_indent="  ", subsequent_indent="  ")
    parts = [f"{name} {size / GIB:.1f}" for name, size in _rounded(group.terms).items()]
    yield from textwrap.wrap(", ".join(parts), PROSE_WIDTH, initial_indent="    ", subsequent_indent="    ")


def _rounded(terms: Mapping[str, float]) -> dict[str, float]:
    """Terms of at least 0.05 GiB; the rest together."""
    large = {name: size for name, size in terms.items() if size >= 0.05 * GIB}
    rest = sum(terms.values()) - sum(large.values())
    return large | ({"others": rest} if rest >= 0.05 * GIB else {})
