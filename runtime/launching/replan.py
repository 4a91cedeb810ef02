"""A plan for the devices that are left, searched in a process of its own: the runtime knows no planner."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from plans.codec import save_plan, sealed
from plans.legal import legal_plan
from plans.plan import ExecutionPlan
from plans.runfile import RunFile
from runtime.reports.endings import RunFailed

SEARCH_S = 10
MOST_S = 600


def devices_left(plan: ExecutionPlan) -> int:
    """Devices of this machine that a plan can still use, as a process sees them that starts now: this one has asked
    before a device was lost, or must not touch CUDA before its ranks do."""
    if plan.cluster.gpu.name == "cpu":
        return plan.cluster.size
    count = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, timeout=MOST_S, check=False)
    return min(int(done.stdout), plan.cluster.size) if done.returncode == 0 else 0


def replanned(plan: ExecutionPlan, run: RunFile, devices: int, per_node: int | None = None) -> ExecutionPlan:
    """The best plan that is found for the same work on fewer devices, by what the run has measured so far; per_node: of
    a node, where that is not the plan's. Raises RunFailed where there is none."""
    nodes = ["--gpus-per-node", str(per_node)] if per_node else []
    said = ""
    for count in _counts(devices):
        with tempfile.TemporaryDirectory(prefix="realplan-") as folder:
            target, before = Path(folder) / "plan.json", Path(folder) / "before.json"
            save_plan(plan, before)
            words = ["--measured", run.output, "--gpus", str(count), *nodes, "--seconds", str(SEARCH_S)]
            words += ["--limits-of", str(before)]
            command = [sys.executable, "-m", "planner.cli", "search", *words, "-o", str(target)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_S, check=False)
            except subprocess.TimeoutExpired:
                said = said or f"the search took longer than {MOST_S} s"
                continue
            if done.returncode == 0:
                return _with_work(_kept(legal_plan(target), plan), plan)
            said = said or done.stderr.strip()
    within, hint = "", "restore the devices, and --resume"
    if plan.limits:
        within = f" within {', '.join(plan.limits)}"
        hint += "; or `realplan search --measured OUTPUT --gpus N` with other limits, and --resume with its plan"
    raise RunFailed(f"no plan for the {devices} devices that are left{within}: {said}", hint)


def _kept(found: ExecutionPlan, plan: ExecutionPlan) -> ExecutionPlan:
    """A plan that was found within the limits of another one; says which of them ask for devices that are gone."""
    if gone := [words for words in plan.limits if words not in found.limits]:
        print(f"planned without {', '.join(gone)}: the devices for that are gone", file=sys.stderr)
    return found


def _counts(devices: int) -> Iterator[int]:
    """Numbers of devices to plan for: all that are left, or as many as are cut in halves."""
    whole = 1 << (devices.bit_length() - 1) if devices else 0
    yield from dict.fromkeys(count for count in (devices, whole) if count)


def _with_work(found: ExecutionPlan, plan: ExecutionPlan) -> ExecutionPlan:
    """A plan of the same calls with the work as it was: its search took lengths and times from the run, and lengths
    that are drawn from the work must not change with it."""
    changed = replace(found, workload=plan.workload, run=plan.run)
    return changed.with_estimate(sealed(changed, changed.estimate)) if changed.estimate else changed
