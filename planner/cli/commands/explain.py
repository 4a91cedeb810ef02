"""What `realplan explain` does, once its options are parsed. Data goes to stdout, words to stderr."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from cost_models.engines.engine import Engine
from planner.explanation.explain import explain
from planner.explanation.explain_text import render_explanation
from planner.request import check_effort
from plans.legal import legal_plan


def explain_command(path: Path, *, engine: Engine, seconds: float, seed: int, as_json: bool) -> int:
    """Explain a legal plan. Returns the exit code: 1 when the plan does not fit in memory."""
    check_effort(seconds, seed)
    plan = legal_plan(path)
    explanation = explain(plan, engine, seconds=seconds, seed=seed, workers=os.cpu_count() or 1, progress=_progress)
    print(json.dumps(asdict(explanation)) if as_json else render_explanation(explanation))
    return 0 if explanation.fits else 1


def _progress(words: str) -> None:
    print(f"{words} ...", file=sys.stderr)
