"""The report: `gpu_check.json`, rewritten after every stage, and a table."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gpu_check.rows import Row, read_records
from gpu_check.setting import Setting
from gpu_check.stages import Stage
from plans.files import write_atomically

FORMAT = "realplan-gpu-check/1"
COLOURS = {"met": "green", "missed": "red", "failed": "bold red", "skipped": "yellow", "shown": ""}


class Report:
    """What is known so far, in memory and in the file."""

    def __init__(self, setting: Setting, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "format": FORMAT,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "device": setting.kind,
            "tiny": setting.tiny,
            "backend": setting.backend,
            "machine": {},
            "stages": {},
        }
        self.save()

    def take(self, stage: Stage, path: Path, seconds: float, limit_s: float, end: str) -> None:
        """Take in the records of a stage. end: why it ended early, or empty."""
        records = read_records(path)
        machines = [record["machine"] for record in records if "machine" in record]
        rows = [Row(**record["row"]) for record in records if "row" in record]
        if end:
            rows.append(Row(case="(stage)", verdict="failed", note=end))
        self.data["machine"] = self.data["machine"] or (machines[0] if machines else {})
        self.data["stages"][stage.name] = {
            "seconds": round(seconds, 1),
            "limit_s": round(limit_s, 1),
            "complete": not end and any("done" in record for record in records),
            "clocks_mhz": machines[-1]["clocks_mhz"] if machines else {},
            "rows": [{name: getattr(row, name) for name in Row.__slots__} for row in rows],
        }
        self.save()

    def save(self) -> None:
        """Write the file."""
        write_atomically(self.path, json.dumps(self.data, indent=1) + "\n")

    @property
    def failed(self) -> int:
        """Rows that failed, and stages that did not end."""
        return sum(row["verdict"] == "failed" for stage in self.data["stages"].values() for row in stage["rows"])

    def show(self) -> None:
        """Print the table to stdout."""
        machine = self.data["machine"]
        title = ", ".join(str(part) for part in (machine.get("card"), machine.get("driver")) if part)
        table = Table(title=title or self.data["device"], box=SIMPLE_HEAD, title_justify="left")
        for name, justify in (("stage", "left"), ("case", "left"), ("value", "right"), ("goal", "left"), ("", "left")):
            table.add_column(name, justify="right" if justify == "right" else "left")
        table.add_column("note", overflow="fold")
        for name, stage in self.data["stages"].items():
            label = f"{name} {stage['seconds']:.0f} s"
            for row in stage["rows"]:
                shown = "" if row["value"] is None else f"{row['value']:.4g} {row['unit']}"
                colour = COLOURS[row["verdict"]]
                verdict = f"[{colour}]{row['verdict']}[/]" if colour else row["verdict"]
                table.add_row(label, row["case"], shown, row["goal"], verdict, row["note"].replace("[", "\\["))
                label = ""
        Console(width=160 if not Console().is_terminal else None).print(table)
