"""Plans beside each other: seconds per iteration, idle share and memory as a table, and their pictures on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cost_models.engines.engine import Engine
from cost_models.estimate import PlanCost, cost_plan
from planner.baselines import BASELINES, Contender
from planner.pictures.idle import idle_share
from planner.pictures.page import Picture, Table, render_page
from plans.errors import Infeasible
from plans.plan import ExecutionPlan
from plans.render import TABLE_WIDTH

COLUMNS = ("plan", "s per iteration", "ratio", "on one engine", "idle", "peak GiB", "fits", "priced by the engine")
SAME_ENGINE = "one engine: seconds of the same plan if the engine of the first plan ran it (-: does not fit)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedPlan:
    """Figures of one plan. ratio: its seconds over those of the first. same_engine_s: its seconds if the engine of the
    first ran it, None where that does not fit. idle: share of all GPU time. decides: of a plan faster than the first,
    the term in which it gains most (`deciding_term`)."""

    name: str
    iteration_s: float
    ratio: float
    same_engine_s: float | None
    idle: float
    peak_gib: float
    fits: bool
    engines: str
    caveats: tuple[str, ...]
    decides: str = ""

    def cells(self) -> tuple[str, ...]:
        """The row as words, in the order of `COLUMNS`."""
        same = "-" if self.same_engine_s is None else f"{self.same_engine_s:.4g}"
        times = (f"{self.iteration_s:.4g}", f"{self.ratio:.2f}x", same)
        return (
            self.name,
            *times,
            f"{self.idle:.1%}",
            f"{self.peak_gib:.1f}",
            "yes" if self.fits else "NO",
            self.engines,
        )


def compare(contenders: Sequence[Contender], engine: Engine) -> list[ComparedPlan]:
    """One row per plan; the first, which `engine` runs, is what the others are measured against."""
    first = contenders[0].cost.iteration_s
    return [
        ComparedPlan(
            name=contender.name,
            iteration_s=contender.cost.iteration_s,
            ratio=contender.cost.iteration_s / first,
            same_engine_s=same_engine_s(contender, engine),
            idle=idle_share(contender.cost.timeline, contender.plan.cluster),
            peak_gib=contender.cost.memory.peak_gib,
            fits=contender.cost.fits,
            engines=contender.engines,
            caveats=contender.caveats,
            decides=deciding_term(contenders[0].cost, contender.cost),
        )
        for contender in contenders
    ]


def deciding_term(first: PlanCost, other: PlanCost) -> str:
    """Why a plan is faster than the first: the term of a call in which it saves most seconds, with both figures. Empty
    where it is not faster."""
    if other.iteration_s >= first.iteration_s:
        return ""
    saved = {
        (call, name): seconds - other.terms.get(call, {}).get(name, 0.0)
        for call, terms in first.terms.items()
        for name, seconds in terms.items()
    }
    call, name = max(saved, key=lambda at: saved[at])
    here, there = (cost.terms.get(call, {}).get(name, 0.0) for cost in (first, other))
    return f"{call}: {name} {here:.3g} s, there {there:.3g} s"


def same_engine_s(contender: Contender, engine: Engine) -> float | None:
    """Seconds per iteration of the contender's plan on another engine, None where it does not fit there."""
    if contender.engines == engine.name:
        return contender.cost.iteration_s
    cost = cost_plan(contender.plan, engine)
    return cost.iteration_s if cost.fits else None


def baselines(plan: ExecutionPlan, engine: Engine) -> tuple[list[Contender], dict[str, Infeasible]]:
    """Every baseline for a plan's workload and cluster, and why others have no plan."""
    found: list[Contender] = []
    missing: dict[str, Infeasible] = {}
    for name, way in BASELINES.items():
        answer = way(plan.workload, plan.cluster, engine)
        if isinstance(answer, Infeasible):
            missing[name] = answer
        else:
            found.append(answer)
    return found, missing


def render_rows(rows: Sequence[ComparedPlan], missing: Mapping[str, Infeasible]) -> str:
    """The table as text of at most 100 columns, with what is not modelled below it."""
    heads = ("plan", "s/iteration", "ratio", "one engine", "idle", "peak GiB", "fits", "priced by the engine")
    lines = [_line(heads)]
    for row in rows:
        *figures, engines = row.cells()
        short = engines.replace(" for training and scoring,", " +").replace(" for generation", " (gen)")
        lines.append(_line((*figures, short)))
    lines += [f"{name[:19]:20}  no plan: {reason.reason}"[:TABLE_WIDTH] for name, reason in missing.items()]
    notes = [f"  {row.name}: {caveat}"[:TABLE_WIDTH] for row in rows for caveat in row.caveats]
    faster = [
        f"{row.name} is faster; the term that decides is {row.decides}"[:TABLE_WIDTH] for row in rows if row.decides
    ]
    return "\n".join([*lines, *faster, *(["not modelled:", *notes] if notes else []), SAME_ENGINE])


def _line(cells: Sequence[str]) -> str:
    name, *figures, engines = cells
    widths = (12, 8, 11, 8, 9, 5)
    middle = "".join(f"{figure:>{width}}" for figure, width in zip(figures, widths, strict=True))
    return f"{name[:16]:17}{middle}  {engines}"[:TABLE_WIDTH].rstrip()


def compare_page(contenders: Sequence[Contender], engine: Engine, title: str) -> str:
    """The HTML page: the table, then the pictures under each other on one time axis."""
    pictures = [
        Picture(
            title=contender.name,
            plan=contender.plan,
            timeline=contender.cost.timeline,
            memory=contender.cost.memory,
            notes=(f"priced by {contender.engines}", *(f"not modelled: {c}" for c in contender.caveats)),
        )
        for contender in contenders
    ]
    return render_page(pictures, title, Table(COLUMNS, tuple(row.cells() for row in compare(contenders, engine))))
