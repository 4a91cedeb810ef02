"""The command line."""

from planner.cli.main import app, main

__all__ = ["app", "main"]
