"""`realplan estimate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cost_models.checkpoint import checkpoint_cost
from cost_models.engines.engine import Engine
from cost_models.estimate import cost_plan
from cost_models.provenance.sources import plan_sources
from cost_models.validation.error_band import error_band
from planner.cli.output import say
from planner.explanation.binding import binding_terms
from planner.explanation.critical import critical_path
from planner.explanation.report import render_cost
from planner.explanation.whatif import refitted, what_if
from planner.remedies.memory import misfits
from plans.legal import legal_plan


def estimate_command(path: Path, *, engine: Engine, changes: list[str], as_json: bool) -> int:
    """Predicted time by term and memory by moment, as the plan stands or under what-if changes."""
    plan = legal_plan(path)
    before = cost_plan(plan, engine)
    changed = what_if(plan, changes)
    cost = cost_plan(changed, engine) if changes else before
    if changes:
        ratio = cost.iteration_s / before.iteration_s
        for line in refitted(plan, changed):
            say(line)
        say(f"with {', '.join(changes)}: {ratio:,.2f}x the time of the plan as it stands")
    sources, band = plan_sources(cost), error_band(cost)
    binding = binding_terms(cost, critical_path(cost.program, cost.durations))
    if as_json:
        found: dict[str, Any] = {"terms": cost.terms, "peak_terms_bytes": cost.memory.peak_terms}
        found |= {"costs": sources.shares, "beyond_measured": sources.beyond, "band": asdict(band)}
        found |= {"checkpoint": asdict(checkpoint_cost(cost.program.plan, engine))}
        found |= {"binding": [asdict(term) for term in binding[:10]]}
        print(json.dumps({**asdict(cost.estimate), "fits": cost.fits, **found}))
    else:
        print(render_cost(cost, sources, band, binding, misfits(cost)))
    return 0
