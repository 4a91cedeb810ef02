"""Runs of pytest in forked children of one process that has imported what tests need and nothing of the project.

A child costs a fork, the imports of the project and the tests themselves; the parent never loads a line of the
project, so that a child may load a mutated file from its first import on.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

OURS = ("plans", "cost_models", "planner", "profiler", "runtime")
OPTIONS = ["-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:pytest_cov"]
MEMORY_BYTES = 8 * 2**30


@dataclass
class Measured:
    """What the tests run: seconds of processor time by test, the tests of every line of a file (0: of its import),
    those that fail without a mutant, and the modules of others that they import."""

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    failing: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)


def forget() -> None:
    """Empty the caches of the project's functions: what a test needs, it runs."""
    for thing in gc.get_objects():
        if isinstance(thing, functools._lru_cache_wrapper) and str(thing.__module__).split(".")[0] in OURS:
            thing.cache_clear()


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Probe:
    """A plugin of pytest that measures every test."""

    def __init__(self, folders: Sequence[str]) -> None:
        import coverage

        self.measured = Measured()
        self.cover = coverage.Coverage(
            data_file=None, config_file=False, include=[f"{Path(name).resolve()}/*" for name in folders]
        )
        self.began = 0.0
        self.setup: dict[str, float] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        forget()
        self.cover.switch_context(nodeid)
        self.began = processor_seconds()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.measured.seconds[nodeid] = processor_seconds() - self.began

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        self.cover.switch_context(f"{item.nodeid} setup")
        try:
            yield
        finally:
            spent, file = processor_seconds() - self.began, item.nodeid.split("::")[0]
            self.setup[file] = max(self.setup.get(file, 0.0), spent)
            self.began += spent
            self.cover.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.nodeid not in self.measured.failing:
            self.measured.failing.append(report.nodeid)

    def finish(self) -> Measured:
        """Everything measured. Lines and seconds of a fixture count for all tests of its file."""
        self.cover.stop()
        data, root = self.cover.get_data(), Path.cwd().resolve()
        tests = list(self.measured.seconds)
        for name in tests:
            self.measured.seconds[name] += self.setup.get(name.split("::")[0], 0.0)
        for file in data.measured_files():
            lines: dict[str, list[str]] = {}
            for line, contexts in data.contexts_by_lineno(file).items():
                here = {name for name in contexts if name and not name.endswith(" setup")}
                for name in (name.removesuffix(" setup") for name in contexts if name.endswith(" setup")):
                    here |= {test for test in tests if test.split("::")[0] == name.split("::")[0]}
                lines[str(line)] = sorted(here) + ([""] if "" in contexts else [])
            self.measured.lines[str(Path(file).relative_to(root))] = lines
        own = {*OURS, "__main__", *(path.stem for part in ("tests", "scripts") for path in Path(part).rglob("*.py"))}
        self.measured.modules = sorted(name for name in sys.modules if name.split(".")[0] not in own)
        return self.measured


class FirstFailure:
    """A plugin of pytest that remembers the first test that fails."""

    def __init__(self) -> None:
        self.name = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.name:
            self.name = f"{report.nodeid} (import)"


class Altered(SourceFileLoader):
    """Loads one module from another text than its file's."""

    text = ""

    def get_code(self, fullname: str) -> CodeType | None:
        return compile(self.text, self.path, "exec", dont_inherit=True)


@dataclass(frozen=True)
class Finder:
    """Finds the mutated module."""

    file: str
    text: str

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The specification of the mutated module, of no other."""
        package = Path(self.file).name == "__init__.py"
        module = str(Path(self.file).parent if package else Path(self.file).with_suffix("")).replace("/", ".")
        if name != module:
            return None
        loader = Altered(name, str(Path(self.file).resolve()))
        loader.text = self.text
        folders = [str(Path(self.file).parent.resolve())] if package else None
        return importlib.util.spec_from_file_location(
            name, loader.path, loader=loader, submodule_search_locations=folders
        )


def preload(modules: Sequence[str]) -> None:
    """Import what children would import otherwise."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception:  # a module that cannot be imported alone is left to the children
            continue
    early = sorted(name for name in sys.modules if name.split(".")[0] in OURS)
    assert not early, f"{early} would be loaded before they are mutated"
    gc.freeze()


def forked(work: Callable[[], Any], limit_s: float, processor_s: int | None = None) -> Any:
    """What `work` returns in a child (through JSON); None where it dies or goes beyond a limit."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.setsid()
        quiet = os.open(os.environ.get("MUTATE_LOG", os.devnull), os.O_RDWR | os.O_CREAT | os.O_APPEND)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        if processor_s is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (processor_s, processor_s + 5))
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        try:
            said = json.dumps(work()).encode()
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(said)
        finally:
            os._exit(0)
    os.close(writer)
    return _answer(child, reader, time.monotonic() + limit_s)


def _answer(child: int, reader: int, deadline: float) -> Any:
    """Read what a child says until it ends, and end it and its children at the deadline."""
    said = b""
    try:
        while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            part = os.read(reader, 1 << 20)
            if not part:
                break
            said += part
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return json.loads(said) if said else None


def _settle(interpreted: bool) -> None:
    """Hypothesis need not shrink what it finds; numba must not load compiled code of another text."""
    from hypothesis import Phase, settings

    settings.register_profile("mutate", phases=(Phase.explicit, Phase.generate), database=None)
    settings.load_profile("mutate")
    if interpreted:
        import numba

        numba.config.DISABLE_JIT = True
    os.environ["NUMBA_DISABLE_JIT"] = str(int(interpreted))


def measured(tests: Sequence[str], folders: Sequence[str], limit_s: float, *, interpreted: bool) -> Measured:
    """Run the tests once and see which lines each of them runs; those of compiled functions only if interpreted."""

    def work() -> dict[str, Any]:
        _settle(interpreted)
        probe = Probe(folders)
        probe.cover.start()
        pytest.main([*OPTIONS, *tests], plugins=[probe])
        return vars(probe.finish())

    said = forked(work, limit_s)
    if said is None:
        raise SystemExit("error: the tests did not end")
    return Measured(**said)


def first_failure(
    file: str, text: str, batches: Sequence[Sequence[str]], *, processor_s: int, limit_s: float, interpreted: bool
) -> str:
    """The first test that fails where `file` has another text, "" where all pass; a hang counts as a failure."""

    def work() -> str:
        _settle(interpreted)
        sys.meta_path.insert(0, Finder(file, text))  # type: ignore[arg-type]
        failure = FirstFailure()
        for batch in filter(None, batches):
            status = pytest.main([*OPTIONS, "-x", *batch], plugins=[failure])
            if failure.name or status != pytest.ExitCode.OK:
                return failure.name or f"pytest ended with {int(status)}"
        return ""

    said = forked(work, limit_s, processor_s)
    return "hang or crash" if said is None else str(said)
