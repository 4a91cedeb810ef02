"""Options that several commands have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from plans.problems import shortened


def _whole(text: str | int) -> int:
    # Python reads `1_0` as ten, and the digits of every script.
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", str(text)):
        raise typer.BadParameter(f"`{shortened(text)}` is not a whole number; for example 4")
    return int(text)


def whole(help_text: str, *names: str) -> Any:
    """An option whose value is a whole number, written with digits alone."""
    return typer.Option(*names, parser=_whole, metavar="INTEGER", help=help_text)


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
