"""Commands that run plans of the tests' small model, and what becomes of them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from plan_cases import tiny_plan, tiny_run
from warm import Started, run_warm, start_warm

from plans.codec import save_plan
from plans.plan import ExecutionPlan
from runtime.reports.records import Status, read_status

DISJOINT = {
    "actor_generate": "d2 t1 p1",
    "ref_infer": ("node 0 gpu 0", "d1 t1 p1"),
    "critic_infer": ("node 0 gpu 1", "d1 t1 p1"),
    "actor_train": ("node 0 gpu 0", "d1 t1 p1"),
    "critic_train": ("node 0 gpu 1", "d1 t1 p1"),
}
PLAN = tiny_plan(2, DISJOINT)
PATIENCE_S = 300  # a loaded machine takes minutes over what is seconds on an idle one
ROOT = Path(__file__).parents[1]


def arguments(folder: Path, *more: str, plan: ExecutionPlan = PLAN, **keys: object) -> list[str]:
    """The command that runs a plan of the small model in a folder."""
    save_plan(plan, folder / "plan.json")
    run = tiny_run(folder / "out", **keys)
    (folder / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    code = "from runtime.cli import main; main()"
    return [sys.executable, "-c", code, str(folder / "plan.json"), "--run", str(folder / "run.yaml"), *more]


def outcome(command: list[str]) -> subprocess.CompletedProcess[str]:
    """What becomes of a command."""
    return run_warm(command, PATIENCE_S)


def fails(command: list[str], code: int = 1) -> str:
    """Run a command that must fail; what it said."""
    result = outcome(command)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


@contextlib.contextmanager
def running(command: list[str], scratch: Path, iteration: int) -> Iterator[tuple[Started, list[Status]]]:
    """A run that has reached an iteration, and where its two ranks are."""
    process = start_warm(command)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            found = [s for rank in (0, 1) if (s := read_status(scratch, rank)) is not None and s.step]
            if len(found) == 2 and all(s.iteration >= iteration for s in found):
                break
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        yield process, found
    finally:
        process.kill()
        process.wait()
