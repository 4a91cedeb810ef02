"""The command line."""

from __future__ import annotations

import gc
import os


def main() -> None:
    """Entry point: settles the process before anything heavy is imported, and runs `planner.cli.app`."""
    # Arrays of a planner are small: threads of BLAS would wait, spinning, for products that never come.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # No schema here has a plugin; looking for some reads the metadata of every installed package.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    gc.set_threshold(200_000, 20, 20)  # imports and plans make many objects and little garbage
    try:
        from planner.cli.app import run

        run()
    finally:
        gc.freeze()  # the process gives all its memory back at once: an end need not search it for cycles
