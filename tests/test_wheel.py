"""The built wheel carries its library and runs from outside the tree, on the Pythons that are at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def uv() -> str | None:
    """uv of this environment (`scripts/setup.sh` puts it there), or of the system."""
    beside = Path(sys.executable).parent / "uv"
    return str(beside) if beside.is_file() else shutil.which("uv")


def interpreter(version: str) -> str | None:
    """A Python of that version on this machine; none is downloaded."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" == version:
        return sys.executable
    found = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    return str(found[-1]) if found else shutil.which(f"python{version}")


@pytest.mark.parametrize(("version", "extra"), [("3.11", "run"), ("3.12", "")])
def test_the_wheel_installs_and_runs(version: str, extra: str) -> None:
    python, tool = interpreter(version), uv()
    if python is None or tool is None:
        pytest.skip(f"there is no Python {version} here" if tool else "there is no uv here")
    command = ["bash", str(ROOT / "scripts" / "wheel_check.sh"), python, extra]
    path = {"PATH": f"{Path(tool).parent}:/usr/local/bin:/usr/bin:/bin"}
    done = subprocess.run(command, env={**os.environ, **path}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"the wheel runs on Python {version}" in done.stdout
