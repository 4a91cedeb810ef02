"""The one way in which the doctor looks at a machine, so that a test can show it another one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

TIMEOUT_S = 20.0


class Probe(Protocol):
    """A machine to look at. Every answer is text; empty where there is no such program, file or package."""

    def run(self, *words: str) -> str:
        """Standard output of a program."""

    def read(self, path: str) -> str:
        """A file of the system."""

    def package(self, name: str) -> str:
        """Version of an installed package."""

    def free_bytes(self, path: str) -> int:
        """Bytes free on the file system of a path; 0 where there is none."""

    def can_listen(self, address: str) -> bool:
        """Whether a process may listen on a free port of an address."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Environment variables."""


@dataclass(frozen=True, slots=True)
class ThisMachine:
    """The machine that this process runs on."""

    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def run(self, *words: str) -> str:
        """Standard output, of a program that ends well and in time."""
        if shutil.which(words[0]) is None:
            return ""
        try:
            done = subprocess.run(list(words), capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout

    def read(self, path: str) -> str:
        """Text of a file."""
        try:
            return Path(path).read_text("utf-8", errors="replace")
        except OSError:
            return ""

    def package(self, name: str) -> str:
        """Version by the package's metadata; nothing is imported."""
        try:
            return version(name)
        except PackageNotFoundError:
            return ""

    def free_bytes(self, path: str) -> int:
        """Free bytes for this user."""
        try:
            return shutil.disk_usage(path).free
        except OSError:
            return 0

    def can_listen(self, address: str) -> bool:
        """Try it."""
        try:
            with socket.socket() as listener:
                listener.bind((address, 0))
                listener.listen(1)
        except OSError:
            return False
        return True


def numbers(line: str) -> Sequence[str]:
    """Fields of a line of nvidia-smi's CSV."""
    return [part.strip() for part in line.split(",")]
