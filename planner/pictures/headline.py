"""The published case beside our estimates: PPO with four 70B models on 128 A100-80GB.

Published: figure "weak scaling" of Mei et al. 2024 (arXiv 2406.14088v1) and the ReaLHF documentation: hours of
4 rounds x 400 = 1,600 steps at batch 512, 128 prompt + 128 new tokens (all of them generated), 4 minibatches, fp16.
17.0, 141.5 and 152.8 h are stated there; 21.2 h is 1,600 times the heuristic's 47.64 s of that figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cost_models.engines.engine import Engine, NamedEngine
from cost_models.estimate import cost_plan
from planner.baselines import BASELINES, Contender
from planner.best import Effort, best_plan
from planner.pictures.compare import same_engine_s
from planner.request import Request, build_request
from planner.search.portfolio import Progress
from plans.errors import Infeasible

STEPS = 1600
SEARCHED = "searched plan"
PUBLISHED_HOURS = {SEARCHED: 17.0, "real-heuristic": 21.2, "deepspeed-chat": 141.5, "openrlhf": 152.8}
PUBLISHED_BY = {SEARCHED: "ReaL's own searched plan"}
ENGINE = NamedEngine("real")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadlineRow:
    """Hours of one way: our estimate (None: no plan), the same on the engine of the searched plan (None: does not
    fit), and what was measured by others (None: nothing)."""

    name: str
    estimated_h: float | None
    same_engine_h: float | None
    measured_h: float | None
    fits: bool


def headline_request() -> Request:
    """The published workload and cluster."""
    models = dict.fromkeys(("actor", "critic", "reward", "ref"), "llama-70b")
    sizes: dict[str, int | str | bool | None] = {
        "batch_size": 512,
        "prompt_tokens": 128,
        "response_tokens": 128,
        "minibatches": 4,
        "dtype": "fp16",
    }
    return build_request(models=models, sizes=sizes, cluster="a100-80gb", gpus=128, gpus_per_node=8, run=None)


def searched(engine: Engine, effort: Effort, progress: Callable[[Progress], None]) -> Contender | Infeasible:
    """The plan that a search finds for the published case."""
    request = headline_request()
    found = best_plan(request.workload, request.cluster, engine, effort=effort, progress=progress)
    if isinstance(found, Infeasible):
        return found
    cost = cost_plan(replace(found.plan, notes=SEARCHED, estimate=None), engine)
    return Contender(name=SEARCHED, cost=cost, engines=engine.name)


def headline_rows(searched: Contender | Infeasible, engine: Engine) -> tuple[list[HeadlineRow], list[Contender]]:
    """The searched plan and every baseline, with the hours others measured."""
    request = headline_request()
    answers: dict[str, Contender | Infeasible] = {SEARCHED: searched}
    answers |= {name: way(request.workload, request.cluster, engine) for name, way in BASELINES.items()}
    rows = [_row(name, answer, engine) for name, answer in answers.items()]
    return rows, [answer for answer in answers.values() if not isinstance(answer, Infeasible)]


def _row(name: str, answer: Contender | Infeasible, engine: Engine) -> HeadlineRow:
    measured = PUBLISHED_HOURS.get(name)
    if isinstance(answer, Infeasible):
        return HeadlineRow(name=name, estimated_h=None, same_engine_h=None, measured_h=measured, fits=False)
    same_s = same_engine_s(answer, engine)
    return HeadlineRow(
        name=name,
        estimated_h=_hours(answer.cost.iteration_s),
        same_engine_h=None if same_s is None else _hours(same_s),
        measured_h=measured,
        fits=answer.cost.fits,
    )


def _hours(iteration_s: float) -> float:
    return STEPS * iteration_s / 3600.0


def render_headline(rows: Sequence[HeadlineRow], engine: Engine) -> str:
    """The table as text, saying which column is whose."""
    own = f"`{engine.name}`"
    lines = [
        "PPO, 4 x llama2-70b (actor, ref, critic, reward), 128 x a100-80gb, batch 512, 128 + 128 tokens,",
        f"4 minibatches, fp16; hours of {STEPS:,} steps",
        "",
        f"{'':18}{'our estimate':>14}{'same engine':>13}{'measured by others':>20}  measured system",
    ]
    for row in rows:
        ours = "no plan" if row.estimated_h is None else f"{row.estimated_h:.1f} h"
        same = "-" if row.same_engine_h is None else f"{row.same_engine_h:.1f} h"
        theirs = "" if row.measured_h is None else f"{row.measured_h:.1f} h"
        source = PUBLISHED_BY.get(row.name, row.name if row.measured_h else "")
        line = f"{row.name:18}{ours:>14}{same:>13}{theirs:>20}  {source}" + ("" if row.fits else "  (does not fit)")
        lines.append(line.rstrip())
    named = _differences(rows)
    return "\n".join(
        [
            *lines,
            *([""] if named else []),
            *named,
            "",
            "Our estimates: none of these was run. The searched plan, symmetric and real-heuristic are priced with",
            f"engine {own}, the others with engines of their own; `same engine`: their plans on {own} (-: do",
            "not fit there). An estimate is what a plan needs where everything runs well; the releases that",
            "were measured in 2024 took longer than their plans need.",
            "Measured by others: Mei et al. 2024 (arXiv 2406.14088v1); the GPU kind is not published there,",
            "A100-80GB is the reading. 21.2 h follows from its 47.64 s per iteration.",
        ]
    )


def _differences(rows: Sequence[HeadlineRow]) -> list[str]:
    """What lies between the estimate and the measurement of the one plan that was measured as it stands."""
    found = []
    for row in rows:
        if row.name == "real-heuristic" and row.estimated_h and row.measured_h:
            error = row.estimated_h / row.measured_h - 1
            found += [
                f"real-heuristic is the layout that was measured, micro-batches too: {row.estimated_h:.1f} h beside",
                f"{row.measured_h:.1f} h is the error of our model on this row, {error:+.0%} (`realplan validate`).",
            ]
    return found
