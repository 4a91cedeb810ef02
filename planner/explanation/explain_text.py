"""An explanation as sentences and tables of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from planner.explanation.alternatives import Alternative, Elsewhere, TooLarge, Where
from planner.explanation.critical import Link, Wait
from planner.explanation.explain import SPARE, Explanation
from plans.program import StepKind
from plans.render import TABLE_WIDTH

MOST_TERMS = 3  # shown of each resource
_WHERE = {
    Where.SETTINGS: "same mesh and degrees, other settings",
    Where.STRATEGY: "same mesh, other degrees",
    Where.MESH: "mesh of another size",
}


def render_explanation(e: Explanation) -> str:
    """The whole explanation; the sections are those of `Explanation`."""
    head = f"{e.iteration_s:.4g} s per iteration (one alone: {e.latency_s:.4g} s)"
    if not e.fits:
        head += "; THE PLAN DOES NOT FIT IN MEMORY (`realplan check` names the step)"
    if e.best_found_s < e.iteration_s * 0.999:
        head += f". A short search found {e.best_found_s:.4g} s on the same cluster: `realplan search` gives that plan"
    sections = (_path, _binding, _idle, _memory, _elsewhere, _upgrades, _kinds)
    return "\n\n".join([_wrap(head), *("\n".join(section(e)) for section in sections)])


def _wrap(text: str, indent: str = "", later: str = "  ") -> str:
    lines = textwrap.wrap(
        text, TABLE_WIDTH, initial_indent=indent, subsequent_indent=indent + later, break_on_hyphens=False
    )
    return "\n".join(lines)


def _path(e: Explanation) -> Iterator[str]:
    path = e.path
    turns = "one iteration" if path.periods == 1 else f"{path.periods} iterations"
    yield _wrap(
        f"CRITICAL PATH: the chain of steps that sets the pace. Their lengths add up to {turns} "
        f"({path.seconds:.4g} s); only a shorter step of this chain makes iterations shorter.",
        later="",
    )
    for link in path.links:
        share = f"{link.seconds / path.seconds:.0%}"
        iteration = f", iteration t+{link.iteration}" if link.iteration else ""
        seconds = f"{link.seconds:.4g}" if link.seconds >= 1e-3 else "<0.001"
        yield f"{seconds:>9} s {share:>4}  {_step(link.step)}{iteration}"[:TABLE_WIDTH]
        yield _wrap(reason(link), " " * 18)
    if e.spare:
        words = f"{SPARE:.0%} of an iteration longer at no cost: {', '.join(e.spare)}"
        yield _wrap(f"Each of these calls could take {words}.", later="")


def reason(link: Link) -> str:
    """Why a step of the critical path starts when it does."""
    when = "" if not link.earlier else " of the iteration before" if link.earlier == 1 else " of earlier iterations"
    when = " of the next iteration" if link.earlier < 0 else when
    other = _step(link.waits_for)
    if link.wait is Wait.GPUS:
        return f"waits until {other}{when} frees GPUs that it needs"
    if link.wait is Wait.DATA and link.kind == StepKind.TRANSFER:
        return f"moves what {other}{when} has made to the GPUs that need it"
    if link.waits_for.startswith(StepKind.TRANSFER):
        return f"waits for the {other}"
    if link.wait is Wait.DATA:
        return f"waits for the data of {other}{when}"
    if link.waits_for.startswith(StepKind.REALLOCATE):
        return f"waits for its weights, which the {other} brings"
    return f"waits for the new weights of {other}{when}"


def _step(name: str) -> str:
    """A step's name in words: `reallocate actor@actor_generate` is a reallocation of the actor."""
    kind, _, copy = name.partition(" ")
    if kind == StepKind.REALLOCATE:
        role, _, call = copy.partition("@")
        return f"reallocation of {role} for {call}"
    if kind == StepKind.TRANSFER:
        return f"transfer from {copy.replace(' -> ', ' to ')}"
    return name


def _binding(e: Explanation) -> Iterator[str]:
    yield "WHAT BINDS: the seconds of the critical path by what would have to be faster"
    for resource, seconds in e.binding_by_resource.items():
        line = f"{seconds:>9.4g} s {seconds / e.iteration_s:>4.0%}  {resource:16}"
        for term in [t for t in e.binding if t.resource == resource][:MOST_TERMS]:
            moves = term.term in (StepKind.REALLOCATE, StepKind.TRANSFER)
            words = _step(term.step) if moves else f"{term.term} of {term.step}"
            more = f"  {words} {term.seconds:.3g}"
            line += more if len(line + more) <= TABLE_WIDTH else ""
        yield line


def _idle(e: Explanation) -> Iterator[str]:
    yield f"IDLE: {e.idle:.1%} of all GPU time"
    for mesh, share in e.idle_by_mesh.items():
        yield f"{share:>16.1%}  of {mesh}"


def _memory(e: Explanation) -> Iterator[str]:
    m = e.memory
    free = m.capacity_gib - m.peak_gib
    yield _wrap(
        f"MEMORY: at most {m.peak_gib:.1f} of {m.capacity_gib:g} GiB, during {_step(m.at_step)} on rank {m.on_rank}; "
        + (f"{free:.1f} GiB stay free." if free >= 0 else f"{-free:.1f} GiB are missing."),
        later="",
    )
    if m.wanted:
        yield _wrap(
            f"{m.wanted_by} would like more: {_layout(m.wanted)} would save {-m.wanted.change_s:.3g} s per iteration "
            f"and lacks {m.wanted.over_gib:.1f} GiB.",
            later="",
        )
    elif e.fits:
        yield "No call alone would be put in a faster layout if it had more."


def _layout(at: Alternative | TooLarge) -> str:
    return f"`{at.strategy}` on `{at.mesh}`"


def _elsewhere(e: Explanation) -> Iterator[str]:
    yield "ELSEWHERE: each call moved alone, everything else as it is"
    for call in e.calls:
        yield f"{call.call} ({call.seconds:.4g} s)"
        yield from (_wrap(sentence, "  ", "    ") for sentence in _sentences(call))


def _sentences(call: Elsewhere) -> Iterator[str]:
    shown = [a for a in call.best if a.where is not Where.SETTINGS or a.change_s < 0]
    for alternative in shown:
        yield f"{_WHERE[alternative.where]}: {_layout(alternative)}: {why(alternative)}"
    for where in (Where.STRATEGY, Where.MESH):
        if where not in [a.where for a in call.best]:
            yield f"{_WHERE[where]}: nothing fits beside the other calls"
    large = call.too_large
    if large:
        yield (
            f"does not fit: {_layout(large)} needs {large.over_gib:.1f} GiB more than a GPU has "
            f"(it would save {-large.change_s:.3g} s)"
        )


def why(a: Alternative) -> str:
    """The change of the period, and what makes it."""
    if a.change_s == 0:
        words = "the iteration stays as long"
    else:
        words = f"{abs(a.change_s):.3g} s {'longer' if a.change_s > 0 else 'SHORTER'} iterations"
    reasons = [f"the call itself takes {a.own_ratio:.2f} times as long"] if abs(a.own_ratio - 1) > 0.005 else []
    if abs(a.moved_s) > 1e-3 + 0.1 * abs(a.change_s):
        reasons.append(f"reallocation takes {abs(a.moved_s):.2g} s {'more' if a.moved_s > 0 else 'less'}")
    if a.blocks:
        reasons.append(f"it shares GPUs with {' and '.join(a.blocks)}, which then waits or makes it wait")
    return words + (": " + ", ".join(reasons) if reasons else "")


def _upgrades(e: Explanation) -> Iterator[str]:
    yield _wrap(
        f"MORE HARDWARE: the best plan that a short search finds, against {e.best_found_s:.4g} s on this cluster",
        later="",
    )
    for upgrade in e.upgrades:
        saved = f"{upgrade.saved_s:.3g} s saved" if upgrade.saved_s > 0 else "nothing saved"
        yield f"{upgrade.iteration_s:>9.4g} s  {saved}: {upgrade.change}"[:TABLE_WIDTH]


def _kinds(e: Explanation) -> Iterator[str]:
    yield _wrap(
        "OTHER KINDS OF PLAN: the best found of each kind (a kind: how wide generation and training are, and which "
        "calls share a mesh)",
        later="",
    )
    for kind in e.kinds:
        mine = " (this plan's kind)" if kind.same_kind else ""
        yield f"{kind.iteration_s:>9.4g} s {kind.ratio:.2f}x{mine}"
        yield _wrap(kind.description, " " * 11)
