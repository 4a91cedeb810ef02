"""The `realplan` command. Heavy libraries are imported inside the commands, so that `--help` is instant.

A command has its options in `planning`, `pictures` or `lists`, and what it does in a file of `commands`.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from planner.cli import lists, pictures, planning
from plans.errors import RealplanError
from plans.terminal import plain_streams

app = typer.Typer(
    name="realplan",
    help="Plan RLHF training: a device mesh and a parallel strategy for every model function call.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (*planning.COMMANDS, *lists.COMMANDS, *pictures.COMMANDS):
    app.command()(command)


def run() -> None:
    """Run the command: errors become one message; exit code 1 for a plan with problems, 2 for wrong use."""
    with plain_streams():
        try:
            app()
        except RealplanError as error:
            fail(str(error), 1 if hasattr(error, "problems") else 2)
        except BrokenPipeError:
            sys.exit(0)


def fail(message: str, code: int) -> NoReturn:
    """Print a message to stderr and exit."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
