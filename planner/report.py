"""A plan's cost as text: time by call and term, memory by call and term at its peak."""

from __future__ import annotations

from cost_models.estimate import PlanCost
from plans.cluster import GIB


def render_cost(cost: PlanCost) -> str:
    """Tables of at most 100 columns."""
    plan = cost.program.plan
    lines = [f"{cost.iteration_s:.4g} s per iteration (one alone: {cost.latency_s:.4g} s), engine {cost.engine}", ""]
    lines.append(f"{'call':18}{'seconds':>10}{'share':>8}  largest terms, seconds")
    for planned in plan.calls:
        terms = sorted(cost.terms[planned.call].items(), key=lambda item: -item[1])
        seconds = sum(value for _, value in terms)
        words = ", ".join(f"{name} {value:.3g}" for name, value in terms[:4] if value > 0)
        lines.append(f"{planned.call:18}{seconds:>10.4g}{seconds / cost.iteration_s:>8.0%}  {words}"[:100])
    for name, seconds in cost.durations.seconds.items():
        if name not in cost.terms and seconds > 1e-4:
            lines.append(f"{name[:30]:30}{seconds:>10.4g} s")
    memory = cost.memory
    capacity = plan.cluster.gpu.memory_gib
    lines += [
        "",
        f"memory: peak {memory.peak_gib:.1f} of {capacity:g} GiB on rank {memory.peak_rank}, {memory.peak_step}",
    ]
    for moment in memory.moments:
        peak = float(moment.bytes_by_rank.max()) / GIB
        lines.append(f"  {moment.step.name[:34]:34}{peak:>8.1f} GiB  " + "#" * round(40 * min(1.0, peak / capacity)))
    lines += ["", "on that rank at its peak, GiB:"]
    lines += [f"  {name[:44]:44}{size / GIB:>8.2f}" for name, size in list(memory.peak_terms.items())[:12]]
    host = float(memory.host_bytes_by_node.max()) / GIB
    lines.append(f"host memory: {host:.0f} of {plan.cluster.host_memory_gib:g} GiB on the fullest node")
    return "\n".join(lines)
