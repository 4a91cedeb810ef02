"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PlanPath = Annotated[Path, typer.Argument(metavar="PLAN", help="plan file (JSON)")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]
EngineName = Annotated[
    str, typer.Option(help="whose costs, such as fsdp; two for training and generation: megatron+cuda-graphs")
]
TablePath = Annotated[Path | None, typer.Option(help="cost table of this machine, as `realplan profile` writes it")]
AllowLong = Annotated[bool, typer.Option("--allow-long", help="let samples be longer than a model's context")]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="write one HTML page that needs no network")]
TimelinePath = Annotated[
    Path | None, typer.Option("--timeline", metavar="FILE", help="measured timeline (timeline.json of realrun)")
]
