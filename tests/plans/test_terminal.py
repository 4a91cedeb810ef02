"""What a terminal is shown: names out of files as text, whatever they hold and whatever the locale."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plan_cases import tiny_plan

from plans.codec import dump_plan
from plans.terminal import Plain, plain_streams, printable

ROOT = Path(__file__).parents[2]
OLD = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_control_characters_are_spelled_out() -> None:
    assert printable("a\x1b[31m\x07\r\x9b\u202e\n\té") == "a\\x1b[31m\\x07\\r\\x9b\\u202e\n\té"
    assert printable("caf\udcc3\udca9") == "café", "a file name that the locale could not read"


def test_streams_take_texts_alone_and_give_their_own_back() -> None:
    before = sys.stdout
    with plain_streams():
        assert isinstance(sys.stdout, Plain) and not hasattr(sys.stdout, "buffer")
        with pytest.raises(TypeError):
            sys.stdout.write(b"")  # type: ignore[arg-type]
    assert sys.stdout is before
    raw = io.TextIOWrapper(io.BytesIO(), "ascii")
    Plain(raw).write("é\x1b")
    raw.flush()
    assert raw.buffer.getvalue() == b"\\xe9\\x1b"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("planner.cli", ["show", "é\x1b.json"]),
        ("planner.cli", ["search", "--model", "\x1b[31mé"]),
        ("planner.cli", ["search", "--method", "\x1b[31mé"]),
        ("runtime.cli", ["é\x1b.json", "\x1b=1"]),
        ("runtime.cli", ["nowhere\x1b.json"]),
    ],
)
def test_commands_in_an_old_locale(module: str, arguments: list[str], tmp_path: Path) -> None:
    text = dump_plan(tiny_plan(2, "d2 t1 p1"))
    (tmp_path / "é\x1b.json").write_text(text.replace('"fp32"', '"fp32\\u001b[31mé"'), "utf-8")
    code = f"from {module} import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, **OLD, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode in (1, 2), done
    assert b"\x1b" not in done.stdout + done.stderr and b"Traceback" not in done.stderr
    assert b"\\x1b" in done.stderr


def test_files_are_read_as_utf_8_in_an_old_locale(tmp_path: Path) -> None:
    text = dump_plan(tiny_plan(2, "d2 t1 p1")).replace('"workload"', '"notes": "žluťoučký",\n  "workload"', 1)
    (tmp_path / "plan.json").write_text(text, "utf-8")
    code = "from planner.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "show", "--html", "page.html", "plan.json"],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, **OLD, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "žluťoučký" in (tmp_path / "page.html").read_text("utf-8")
