"""A headless browser, where the machine has one, and what it makes of a page."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
NO_CHROMIUM = "no chromium on PATH (Debian: apt-get install chromium)"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def browser(page: Path, profile: Path) -> str:
    """The document after its scripts ran."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--window-size=1200,900", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def reported(dom: str) -> dict[str, str]:
    """What the page's script says of itself on `<body>`."""
    body = re.search(r"<body[^>]*>", dom)
    assert body
    return dict(re.findall(r'data-(\w+)="([^"]*)"', body.group()))
