"""Broken files, options, places and environments: each is refused by one error that names its place and a legal value.

Inputs are legal ones with a few faults, from a seed, tried in forked processes (`fuzz_runs`). CI tries 2,000; `--fuzz
50000` tries more. A table of what became of them is printed: how many were refused, with a hint, with a place. No
traceback, crash or hang over 20 s; what is accepted must mean what a plain parser reads (`fuzz_files`).
"""

from __future__ import annotations

import os
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz_faults import broken, broken_header
from fuzz_files import Kind, kinds, prepared
from fuzz_options import Options
from fuzz_runs import Outcome, Tally, attempts

from plans.errors import RealplanError

HINTED = 0.9
PLACELESS = re.compile(r"has no rows|is empty\b|more than [\d,]+ bytes")


@pytest.fixture(scope="module")
def rates(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """What became of all inputs, by kind; printed at the end, past pytest's capture."""
    tally = Tally()
    yield tally
    if tally.kinds:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("\n" + "\n".join([tally.text(), *tally.without_hint[:50]]), file=sys.stderr)


def finish(tally: Tally, rates: Tally) -> None:
    """No failure, hints nearly always, places wherever there is one."""
    rates.counts.update(tally.counts)
    rates.without_hint.extend(tally.without_hint)
    assert not tally.failures, f"{len(tally.failures)} failures, such as\n" + "\n".join(tally.failures[:5])
    for kind in tally.kinds:
        refused = tally.of("refused", kind)
        assert tally.of("hinted", kind) >= HINTED * refused, "\n".join([tally.text(), *tally.without_hint[:50]])
        assert tally.of("placed", kind) == tally.of("has_place", kind), f"{kind}: places\n{tally.text()}"


def file_attempt(number: int, kind: Kind, path: Path) -> Outcome:
    """Break a file, read it, and hold what is read against the text."""
    rng = random.Random(f"file {number}")
    binary = isinstance(kind.content, bytes)
    content = broken_header(kind.content, rng) if isinstance(kind.content, bytes) else broken(kind.content, rng)
    path.write_bytes(content)
    title = kind.title or kind.name
    try:
        found = kind.read(path)
    except RealplanError as error:
        message, _, hint = str(error).partition("hint: ")
        # What is beside the file may be to blame: it is named instead.
        assert str(path.parent) in message, (content[:2000], message)
        assert len(message) < 12_000, len(message)
        empty = not content.decode("utf-8", "replace").strip("\ufeff \t\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
        has_place = not (binary or empty or kind.title == "checkpoint" or PLACELESS.search(message))
        placed = has_place and bool(re.search(rf"{re.escape(path.name)}:\d+:\d+: ", message))
        assert placed or not has_place, (content[:2000], message)
        return Outcome(title, True, bool(hint.strip()), placed, has_place, message[:500])
    if not binary:
        text = content.decode().removeprefix("\ufeff")
        assert kind.same(found, kind.parse(text)), ("accepted", content[:3000])
    return Outcome(title)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, Kind, Path]]:
    """Every kind of file by its title, with its number and where it lies."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads and forks
    every = prepared(tmp_path_factory.mktemp("files"))
    return {kind.title or kind.name: (i, kind, path) for i, (kind, path) in enumerate(every)}


TITLES = [kind.title or kind.name for kind in kinds()]


@pytest.mark.parametrize("title", TITLES)
def test_unbroken_files_are_read(title: str, files: dict[str, tuple[int, Kind, Path]]) -> None:
    _, kind, path = files[title]
    content = kind.content if isinstance(kind.content, bytes) else kind.content.encode()
    path.write_bytes(content)
    found = kind.read(path)
    if isinstance(kind.content, str):
        assert kind.same(found, kind.parse(kind.content))


@pytest.mark.parametrize("title", TITLES)
def test_broken_files(title: str, files: dict[str, tuple[int, Kind, Path]], fuzz: int, rates: Tally) -> None:
    first, kind, path = files[title]
    tally = Tally()
    attempts(range(first, fuzz * 6 // 10, len(files)), lambda n: file_attempt(n, kind, path), tally)
    finish(tally, rates)


def test_unbroken_options_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the checkpoints of a run that there is not."""
    monkeypatch.chdir(tmp_path)
    for line, outcome in Options(tmp_path).unbroken():
        assert outcome.refused == ("=runs" in line or " runs " in line), line


@pytest.mark.parametrize("what", sorted(set(Options.TURNS)))
def test_broken_options(what: str, tmp_path: Path, fuzz: int, rates: Tally) -> None:
    options, tally, turns = Options(tmp_path), Tally(), Options.TURNS
    attempts([n for n in range(fuzz * 4 // 10) if turns[n % len(turns)] == what], options.attempt, tally)
    finish(tally, rates)


def test_the_suite_notices_what_it_looks_for(tmp_path: Path) -> None:
    """A traceback, a crash, a hang and a wrong success are failures, and the rest is still tried."""
    import fuzz_runs

    def attempt(number: int) -> Outcome:
        if number == 1:
            raise KeyError("a traceback")
        if number == 2:
            os.kill(os.getpid(), 9)
        if number == 3:
            while True:
                pass
        if number == 4:
            time.sleep(1000)
        return Outcome("kind", number % 2 == 0)

    tally: Any = Tally()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz_runs, "SECONDS", 1.0)
        attempts(range(7), attempt, tally)
    first, second, third, fourth = tally.failures
    assert "KeyError" in first and "input 2: died" in second and "input 3: no answer after 1 s" in third
    assert "input 4: no answer after 1 s" in fourth
    assert tally.of("tried") == 3 and tally.of("refused") == 2
