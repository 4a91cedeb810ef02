"""What `realplan doctor` does. The page goes to stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from planner.doctor.facts import Facts, gather
from planner.doctor.findings import Finding, findings
from planner.doctor.probe import Probe, ThisMachine

SPEEDS_S = 120.0
COLOURS = {"ok": "green", "note": "yellow", "lacks": "bold red"}


def doctor_command(*, speeds: bool, as_json: bool, probe: Probe | None = None) -> int:
    """Print what this machine has; 1 when something lacks that a run or a search needs."""
    facts = gather(probe or ThisMachine())
    found = findings(facts)
    measured = measure_speeds(facts) if speeds else {}
    if as_json:
        shown = {"facts": asdict(facts), "findings": [asdict(one) for one in found], "speeds": measured}
        print(json.dumps(shown, indent=1))
    else:
        _print(found, measured)
    return 1 if any(one.level == "lacks" for one in found) else 0


def measure_speeds(facts: Facts) -> dict[str, Any]:
    """Quick speeds of memory and links, by a process of its own, because planning never loads torch.

    Figure -> GB/s or ms; `error` where they could not be measured.
    """
    if "torch" not in facts.packages:
        return {"error": "torch is not installed"}
    command = [sys.executable, "-m", "profiler.speeds"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SPEEDS_S, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
    except subprocess.CalledProcessError as error:
        return {"error": (error.stderr.strip().splitlines() or ["no word"])[-1]}
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    return found


def _print(found: list[Finding], measured: dict[str, Any]) -> None:
    table = Table(box=SIMPLE_HEAD)
    for name in ("", "", "found"):
        table.add_column(name, overflow="fold")
    for one in found:
        text = escape(one.text) + (f"\n[dim]hint: {escape(one.hint)}[/]" if one.hint else "")
        table.add_row(one.subject, f"[{COLOURS[one.level]}]{one.level}[/]", text)
    for name, value in measured.items():
        shown = value if isinstance(value, str) else f"{value:.4g}"
        table.add_row("speeds", "ok" if name != "error" else "note", escape(f"{name}: {shown}"))
    Console().print(table)
