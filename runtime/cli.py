"""`realrun`: run a plan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plans.terminal import plain_streams

if TYPE_CHECKING:
    from runtime.launching.preparation import Words

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
export_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
PlanPath = Annotated[
    Path, typer.Argument(help="plan file, as `realplan search` writes it", exists=True, dir_okay=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="keys of the run file, such as iterations=3")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="say what would run on which rank and whether it can, and stop")
]


@app.command()
def realrun(
    plan: PlanPath,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="run file (default: the one that the plan names)")] = None,
    dry_run: DryRun = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the newest checkpoint of the run file's output")
    ] = False,
    allow_stale: Annotated[bool, typer.Option("--allow-stale", help="run although the estimate is stale")] = False,
    allow_long: Annotated[
        bool, typer.Option("--allow-long", help="let samples be longer than a model's context")
    ] = False,
    node_rank: Annotated[
        int | None, typer.Option(help="on several machines: the node of the plan that this one is, from 0")
    ] = None,
    master_addr: Annotated[str | None, typer.Option(help="address of the machine of node 0")] = None,
    master_port: Annotated[int | None, typer.Option(min=1, max=65535, help="a free port there (29500)")] = None,
    ray: Annotated[str, typer.Option(metavar="ADDRESS", help="run on this Ray cluster; auto: the one here")] = "",
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
) -> None:
    """Run a plan: train the models of its workload with the run file's data, weights and reward.

    `realrun export CHECKPOINT FOLDER` makes a Hugging Face folder of a checkpoint.
    """
    from plans.codec import BadPlan
    from plans.errors import RealplanError
    from runtime.launching.preparation import Words

    words = Words(dry_run, allow_stale, allow_long, resume, node_rank, master_addr, master_port)
    given = _assignments(overrides or [])
    try:
        if ray and not dry_run:
            _run_on_ray(plan, given, run, words, ray)
        else:
            _run(plan, given, run, words, debug=debug)
    except RealplanError as error:
        if debug:
            _say(getattr(error, "details", ""))
            raise
        _say(str(error) if isinstance(error, BadPlan) else f"error: {error}")
        raise typer.Exit(1) from None


def _assignments(overrides: list[str]) -> list[str]:
    for override in overrides:
        if "=" not in override:
            raise typer.BadParameter(f"`{override}` is not of the form key=value", param_hint="overrides")
    return overrides


def _run(path: Path, overrides: list[str], run_path: Path | None, words: Words, *, debug: bool) -> None:
    from runtime.launching.preflight import check_packages
    from runtime.launching.preparation import checked, read

    ready = read(path, overrides, run_path, words)
    if words.dry_run:
        checked(ready, words)
        return
    check_packages()
    from runtime.launching.launch import launch
    from runtime.machines.joined import join
    from runtime.machines.run import run_on_machines, told
    from runtime.processes.lifetime import end_at_once
    from runtime.reports.endings import RunFailed
    from runtime.reports.monitor import summary
    from runtime.reports.page import write_page

    with told(ready.plan, ready.run, ready.place):
        ready = checked(ready, words)
    try:
        if ready.place is not None:
            lines = run_on_machines(ready.plan, ready.run, ready.place)
        elif ready.member is not None:
            lines = join(ready.plan, ready.run, ready.member)
        else:
            lines = launch(ready.plan, ready.run, ready.start)
    except RunFailed as error:
        if ready.member is None:
            raise
        _say(f"{error.details if debug else ''}error: {error}")
        end_at_once(1)
    if ready.first:
        for line in [*summary(ready.plan, lines), f"output: {ready.run.output}"]:
            _say(line)
        if ready.run.report and lines:
            _say(write_page(Path(ready.run.output)))


def _run_on_ray(path: Path, overrides: list[str], run_path: Path | None, words: Words, address: str) -> None:
    from plans.legal import legal_plan
    from runtime.launching.on_ray import run_on_ray

    flags = {"--resume": words.resume, "--allow-stale": words.allow_stale, "--allow-long": words.allow_long}
    again = [str(path.resolve()), *overrides, *(flag for flag, given in flags.items() if given)]
    run_on_ray(legal_plan(path), [*again, *(["--run", str(run_path.resolve())] if run_path else [])], address)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@export_app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint, or the output of a run: its newest one")],
    folder: Annotated[Path, typer.Argument(help="where the Hugging Face folder goes")],
    role: Annotated[str, typer.Option(help="the trained role (default: the first one)")] = "",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32 (default: the plan's)")] = "",
) -> None:
    """Make a Hugging Face folder of a checkpoint. Needs neither a plan nor a GPU."""
    from plans.errors import RealplanError

    if dtype not in ("", "bf16", "fp16", "fp32"):
        raise typer.BadParameter(f"`{dtype}` is none of bf16, fp16, fp32", param_hint="--dtype")
    from runtime.launching.preflight import check_packages

    try:
        check_packages()
        from runtime.checkpoints.export import export_checkpoint

        found = export_checkpoint(checkpoint, folder, role, dtype)
    except RealplanError as error:
        _say(f"error: {error}")
        raise typer.Exit(1) from None
    _say(f"{folder}: {found.index.iteration} iterations, of {found.folder}")


def main() -> None:
    """Console script: `realrun PLAN ...`, and `realrun export CHECKPOINT FOLDER`."""
    with plain_streams():
        if sys.argv[1:2] == ["export"]:
            export_app(sys.argv[2:], prog_name="realrun export")
        app()
