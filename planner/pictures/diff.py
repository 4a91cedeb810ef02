"""What two plans do differently: calls whose mesh, strategy, settings, order or lag changed, and what that does."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from cost_models.estimate import PlanCost
from plans.cluster import GIB
from plans.lengths import keys_of
from plans.plan import ExecutionPlan, PlannedCall
from plans.render import TABLE_WIDTH
from plans.strategy import KEYS


@dataclass(frozen=True, slots=True)
class Change:
    """One field of one call (or of the plan, `call` empty) in both plans, as words."""

    call: str
    field: str
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """Seconds and GiB on the fullest GPU of one call, in both plans; None where a plan has no such call."""

    call: str
    seconds: tuple[float | None, float | None]
    gib: tuple[float | None, float | None]


def changes(a: ExecutionPlan, b: ExecutionPlan) -> list[Change]:
    """Every difference between two plans, estimates and provenance apart."""
    found = [*_surroundings(a, b)]
    before, after = ({p.call: p for p in plan.calls} for plan in (a, b))
    for call in dict.fromkeys([*before, *after]):
        if call not in before or call not in after:
            words = ("absent", "present") if call not in before else ("present", "absent")
            found.append(Change(call, "call", *words))
        else:
            found += _of_call(a, b, before[call], after[call])
    both = [call for call in before if call in after]
    order = [call for call in after if call in before]
    if both != order:
        found.append(Change("", "order", ", ".join(both), ", ".join(order)))
    return found


def _surroundings(a: ExecutionPlan, b: ExecutionPlan) -> list[Change]:
    """Differences of workload and cluster."""
    found = []
    for name in ("batch_size", "group_size", "prompt_tokens", "response_tokens", "mean_prompt_tokens",
                 "mean_response_tokens", "prompt_lengths", "response_lengths",
                 "minibatches", "dtype"):  # fmt: skip
        words = [
            _lengths(plan, name) if name.endswith("lengths") else str(getattr(plan.workload, name)) for plan in (a, b)
        ]
        found.append(Change("", name, *words))
    found.append(Change("", "algorithm", a.workload.graph.name, b.workload.graph.name))
    for role in dict.fromkeys([*a.workload.graph.roles, *b.workload.graph.roles]):
        names = [plan.workload.models[role].name if role in plan.workload.models else "-" for plan in (a, b)]
        found.append(Change("", role, *names))
    sizes = [f"{plan.cluster.nodes} x {plan.cluster.gpus_per_node} {plan.cluster.gpu.name}" for plan in (a, b)]
    found.append(Change("", "cluster", *sizes))
    return [change for change in found if change.before != change.after]


def _lengths(plan: ExecutionPlan, name: str) -> str:
    percentiles = getattr(plan.workload, name)
    return " ".join(f"{key}={tokens}" for key, tokens in keys_of(percentiles).items()) or "not measured"


def _of_call(a: ExecutionPlan, b: ExecutionPlan, before: PlannedCall, after: PlannedCall) -> list[Change]:
    pairs = [("mesh", before.mesh.text(a.cluster), after.mesh.text(b.cluster))]
    pairs.append(("strategy", before.strategy.degrees, after.strategy.degrees))
    for name in KEYS:
        pairs.append((name, str(getattr(before.strategy, name)), str(getattr(after.strategy, name))))
    pairs.append(("lag", str(before.lag), str(after.lag)))
    return [Change(before.call, name, x, y) for name, x, y in pairs if x != y]


def effects(a: PlanCost, b: PlanCost) -> list[Effect]:
    """Time and memory of every call in both plans; reallocations and transfers by their step name, time alone."""
    gib = [{m.step.name: float(m.bytes_by_rank.max()) / GIB for m in cost.memory.moments} for cost in (a, b)]
    seconds = [cost.durations.seconds for cost in (a, b)]
    return [
        Effect(
            call=name,
            seconds=(seconds[0].get(name), seconds[1].get(name)),
            gib=(gib[0].get(name), gib[1].get(name)),
        )
        for name in dict.fromkeys([*seconds[0], *seconds[1]])
    ]


def render_diff(found: Sequence[Change], a: PlanCost, b: PlanCost) -> str:
    """The differences and their effect as text of at most 100 columns."""
    if not found:
        return "the plans are the same"
    lines = [f"{'call':18}{'what':20}before -> after"]
    for change in found:
        where, words = change.call or "(plan)", f"{change.before} -> {change.after}"
        if len(words) > 62:
            indent = " " * 38
            lines += textwrap.wrap(f"{where:18}{change.field:20}{change.before}", TABLE_WIDTH, subsequent_indent=indent)
            lines += textwrap.wrap(f"{'':35}-> {change.after}", TABLE_WIDTH, subsequent_indent=indent)
        else:
            lines.append(f"{where:18}{change.field:20}{words}")
    lines += ["", f"{'':34}{'seconds':>24}{'GiB on the fullest GPU':>32}"]
    for effect in effects(a, b):
        if effect.seconds != (None, None) and _matters(effect, a):
            lines.append(f"{effect.call[:33]:34}{_pair(effect.seconds, '.3f'):>24}{_pair(effect.gib, '.1f'):>32}")
    peaks = (a.memory.peak_gib, b.memory.peak_gib)
    total = _pair((a.iteration_s, b.iteration_s), ".4g")
    lines.append(f"{'iteration':34}{total:>24}{_pair(peaks, '.1f'):>32}")
    ratio = b.iteration_s / a.iteration_s - 1.0
    verdict = "the same time" if abs(ratio) < 5e-5 else f"{abs(ratio):.2%} {'slower' if ratio > 0 else 'faster'}"
    return "\n".join([*lines, "", f"the second plan: {verdict}" + ("" if b.fits else ", and does not fit in memory")])


def _matters(effect: Effect, cost: PlanCost) -> bool:
    """Whether a step's time or memory changed by what the table shows."""
    if None in effect.seconds:
        return max(value or 0.0 for value in effect.seconds) > 1e-4 * cost.iteration_s
    x, y = (value or 0.0 for value in effect.seconds)
    p, q = (value or 0.0 for value in effect.gib)
    return abs(x - y) >= 5e-4 or abs(p - q) >= 0.05


def _pair(values: tuple[float | None, float | None], spec: str) -> str:
    words = ["-" if value is None else format(value, spec) for value in values]
    return "" if values == (None, None) else f"{words[0]} -> {words[1]}"
