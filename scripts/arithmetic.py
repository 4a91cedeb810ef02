"""Sums with an answer that can be checked: the problems and the reward of `scripts/demo.sh --math`."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

LARGEST = 30
HELD_OUT = 200
SOLVED = 1.0
"""Score of a response that is the answer and nothing else."""
FOUND = 0.5
"""Score of a response that begins with the answer and goes on."""


def score(response: str, answer: str) -> float:
    """What a response to `a + b =` is worth: SOLVED, FOUND, or 0 where its first number is not the answer."""
    found = re.match(r"\s*(-?\d+)(.*)", response, re.DOTALL)
    if found is None or found[1] != answer:
        return 0.0
    return FOUND if found[2].strip(" .\n") else SOLVED


def write_problems(train: Path, held_out: Path, seed: int) -> None:
    """All sums of two numbers up to LARGEST as conversations in which the assistant has begun: HELD_OUT, drawn by the
    seed, in one file and the rest in the other."""
    pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    random.Random(seed).shuffle(pairs)
    for path, chosen in ((held_out, pairs[:HELD_OUT]), (train, pairs[HELD_OUT:])):
        path.write_text("".join(json.dumps(_problem(a, b)) + "\n" for a, b in chosen), encoding="utf-8")


def _problem(a: int, b: int) -> dict[str, Any]:
    told = (("system", "Calculate."), ("user", f"What is {a} + {b}?"), ("assistant", f"{a} + {b} ="))
    return {"messages": [{"role": role, "content": text} for role, text in told], "answer": str(a + b)}
