"""The options of the commands that look at plans: show, trace, compare, diff, headline, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner.cli.options import AsJson, Html, PlanPath, TimelinePath, whole


def show(path: PlanPath, html: Html = None, timeline: TimelinePath = None) -> None:
    """Print a plan: which call runs where, how it is cut, and when; or write it as a page."""
    from planner.cli.commands.show import show_command

    raise typer.Exit(show_command(path, html=html, measured=timeline))


def trace(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="plan file, or timeline.json beside its plan.json")],
    timeline: TimelinePath = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="default: beside the file")] = None,
) -> None:
    """Write a timeline as a trace for Perfetto or chrome://tracing."""
    from planner.cli.commands.show import trace_command

    raise typer.Exit(trace_command(path, measured=timeline, output=output))


def compare(
    paths: Annotated[list[Path], typer.Argument(metavar="PLAN...", help="plan files; ratios are to the first")],
    baselines: Annotated[bool, typer.Option("--baselines", help="add what other systems would do")] = False,
    html: Html = None,
    engine: Annotated[str, typer.Option(help="named set of cost constants [that of the first plan]")] = "",
    as_json: AsJson = False,
) -> None:
    """Compare plans with each other and with the baselines."""
    from planner.cli.commands.compare import compare_command

    raise typer.Exit(compare_command(paths, baselines=baselines, html=html, engine=engine, as_json=as_json))


def diff(
    before: Annotated[Path, typer.Argument(metavar="A", help="plan file")],
    after: Annotated[Path, typer.Argument(metavar="B", help="plan file")],
    as_json: AsJson = False,
) -> None:
    """Say what the second plan does differently, and what that does to time and memory."""
    from planner.cli.commands.compare import diff_command

    raise typer.Exit(diff_command(before, after, as_json=as_json))


def headline(
    engine: Annotated[str, typer.Option(help="engine of the searched plan and the uniform baselines")] = "",
    seconds: Annotated[float, typer.Option(help="search budget")] = 10.0,
    seed: Annotated[int, whole("random seed")] = 0,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Search the published case (four 70B models, 128 A100) and print its hours beside the published ones."""
    from planner.cli.commands.headline import headline_command

    raise typer.Exit(headline_command(engine=engine, seconds=seconds, seed=seed, html=html, as_json=as_json))


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="output folder of a run, which may still go on")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="default: report.html in the folder")] = None,
) -> None:
    """Write the page of a run: curves, timelines, memory, samples, predicted beside measured."""
    from planner.cli.commands.report import report_command

    raise typer.Exit(report_command(folder, output=output))


COMMANDS = (show, trace, compare, diff, headline, report)
