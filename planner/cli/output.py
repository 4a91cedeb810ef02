"""How commands speak: words to stderr, files written whole."""

from __future__ import annotations

import sys
from pathlib import Path

from planner.text import wrapped
from plans.files import write_atomically
from plans.plan import ExecutionPlan


def say(words: str) -> None:
    """Words beside the data, wrapped."""
    print("\n".join(wrapped(words, indent="")), file=sys.stderr)


def limits_note(plan: ExecutionPlan) -> str:
    """Under which rules a plan was searched, which baselines do not know; empty without rules."""
    if not plan.limits:
        return ""
    from planner.baselines import BASELINES

    return f"searched under {', '.join(plan.limits)}; the baselines ignore that: {', '.join(BASELINES)}"


def write(path: Path, text: str) -> None:
    """Write a file whole, and say so."""
    write_atomically(path, text)
    print(f"wrote {path}", file=sys.stderr)
