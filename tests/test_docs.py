"""What the pages name exists: files, links, commands with their options; lists of files keep to their bounds."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from planner.cli.app import app
from runtime.cli import app as run_app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PLACES = {path.name for path in ROOT.iterdir()} - {"runs", "wheels"}
MOST_FILES = {"GPU kind": 3, "model family": 2, "algorithm": 3, "cost term": 2, "engine": 2, "command": 2}
"""How many files an addition may touch."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@cache
def file_names() -> frozenset[str]:
    """Names of all files in the folders that the project has."""
    folders = ("plans", "cost_models", "planner", "profiler", "runtime", "scripts", "tests", "docs")
    return frozenset(path.name for folder in folders for path in (ROOT / folder).rglob("*"))


def spans(text: str) -> list[str]:
    """Code in a page: between backticks, and indented lines without their comments."""
    lines = [line[4:].split("  #")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    return [*(" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)), *lines]


@pages
def test_paths_exist(page: Path) -> None:
    text = page.read_text()
    named = {word.strip(".,;:()`|") for span in spans(text) for word in span.split()}
    inside = {word for word in named if "/" in word and word.split("/")[0] in PLACES}
    missing = {word for word in inside if not (list(ROOT.glob(word)) if "*" in word else (ROOT / word).exists())}
    alone = {word for word in named if re.fullmatch(r"\w+\.(py|sh)", word) and word not in file_names()}
    assert not missing | (alone - {"file.py"})


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(#[^)]*)?\)", page.read_text()):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor[1:] in slugs, f"{target}{anchor}"


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def options(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


@pages
def test_commands_exist_with_their_options(page: Path) -> None:
    known_commands = commands()
    run = typer.main.get_command(run_app)
    for span in spans(page.read_text()):
        program, _, rest = span.partition(" ")
        words = rest.replace("=", " ").split()
        if program == "realplan" and words:
            assert words[0] in known_commands, span
            known = options(known_commands[words[0]])
        elif program == "realrun":
            known = options(run)
        elif program in known_commands and any(word.startswith("--") for word in words):
            known = options(known_commands[program])
        else:
            continue
        assert not {word for word in words if word.startswith("-")} - known, span


def test_every_command_is_in_a_page() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    assert not {name for name in commands() if not re.search(rf"\b{name}\b", text)}


def test_additions_touch_few_files() -> None:
    """The numbered files of a section are at most what its heading says, and that at most the bound."""
    sections = (ROOT / "docs" / "how-to-add.md").read_text().split("\n## ")[1:]
    for what, most in MOST_FILES.items():
        (section,) = (s for s in sections if re.match(rf"An? {what}\b", s))
        heading, body = section.split("\n", 1)
        promised = max(int(number) for number in re.findall(r"\d+", heading))
        assert len(re.findall(r"^\d+\. ", body, re.MULTILINE)) <= promised <= most, what
