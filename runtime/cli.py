"""`realrun`: run a plan."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from plans.terminal import plain_streams

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def realrun(
    plan: Annotated[
        Path, typer.Argument(help="plan file, as `realplan search` writes it", exists=True, dir_okay=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="keys of the run file, such as iterations=3")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="run file (default: the one that the plan names)")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would run on which rank and whether it can, and stop")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the newest checkpoint of the run file's output")
    ] = False,
    allow_stale: Annotated[bool, typer.Option("--allow-stale", help="run although the estimate is stale")] = False,
    allow_long: Annotated[
        bool, typer.Option("--allow-long", help="let samples be longer than a model's context")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
) -> None:
    """Run a plan: train the models of its workload with the run file's data, weights and reward."""
    for override in overrides or []:
        if "=" not in override:
            raise typer.BadParameter(f"`{override}` is not of the form key=value", param_hint="overrides")
    from plans.codec import BadPlan
    from plans.errors import RealplanError

    try:
        _run(plan, overrides or [], run, dry_run, allow_stale, allow_long, resume)
    except RealplanError as error:
        if debug:
            _say(getattr(error, "details", ""))
            raise
        _say(str(error) if isinstance(error, BadPlan) else f"error: {error}")
        raise typer.Exit(1) from None


def _run(
    path: Path,
    overrides: list[str],
    run_path: Path | None,
    dry_run: bool,
    allow_stale: bool,
    allow_long: bool,
    resume: bool,
) -> None:
    from runtime.checkpoints.resume import Start, choose_start
    from runtime.launching.describe import batch_words, program_words
    from runtime.launching.entry import prepare_ranks
    from runtime.launching.member import outside_member
    from runtime.launching.output import check_output
    from runtime.launching.preflight import (
        check_context,
        check_devices,
        check_estimate,
        check_job,
        check_packages,
        check_weights,
        legal_plan,
        read_run,
    )
    from runtime.launching.slurm import rank_variables
    from runtime.models.support import check_supported

    member = outside_member({**os.environ, **rank_variables(os.environ)})
    plan = legal_plan(path)
    if not allow_stale:
        check_estimate(plan, path)
    plan = check_context(plan, path, allow_long)
    run = read_run(plan, path, run_path, overrides)
    if resume:
        run = run.model_copy(update={"resume_from": run.resume_from or str(run.checkpoint_folder)})
    first = member is None or member.rank == 0
    if dry_run or first:
        for line in batch_words(plan):
            print(line) if dry_run else _say(line)
    if dry_run:
        for line in program_words(plan):
            print(line)
    check_supported(plan)
    check_weights(plan, run)
    check_packages()
    check_devices(plan, None if member is None else member.world)
    if first:
        check_output(plan, run)
    start = choose_start(plan, run) if first else Start()
    if dry_run:
        check_job(plan, run)
        return
    if member is None:
        prepare_ranks(plan)
    from runtime.launching.launch import launch
    from runtime.reports.monitor import summary

    lines = launch(plan, run, member, start)
    if first:
        for line in [*summary(plan, lines), f"output: {run.output}"]:
            _say(line)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> None:
    """Console script."""
    with plain_streams():
        app()
