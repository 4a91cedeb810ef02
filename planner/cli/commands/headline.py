"""`realplan headline`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from planner.best import Effort
from planner.cli.engine_words import engine_of
from planner.cli.output import write
from planner.cli.progress import SearchProgress
from planner.pictures import headline as published
from planner.pictures.compare import compare_page
from planner.request import check_effort
from plans.files import check_target


def headline_command(*, engine: str, seconds: float, seed: int, html: Path | None, as_json: bool) -> int:
    """The published case: our hours beside those measured by others."""
    check_effort(seconds, seed)
    if html:
        check_target(html)
    runs = engine_of(engine) if engine else published.ENGINE
    effort = Effort(seconds=seconds, seed=seed, workers=os.cpu_count() or 1)
    with SearchProgress() as progress:
        rows, contenders = published.headline_rows(published.searched(runs, effort, progress.update), runs)
    if as_json:
        print(json.dumps({"steps": published.STEPS, "engine": runs.name, "rows": [asdict(row) for row in rows]}))
    else:
        print(published.render_headline(rows, runs))
    if html:
        write(html, compare_page(contenders, runs, "PPO with four 70B models on 128 A100-80GB"))
    return 0
