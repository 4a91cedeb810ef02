"""Which wrong formulas the tests let pass: a seeded sample of mutants of some folders, each against the tests that
cover its line, in a copy of the tree.

    scripts/mutate.sh cost_models/time --mutants 150 --seed 0

Cosmic Ray makes the mutants: another number, operator or comparison at one place. One that dies without the ledger
(`--ledger`) dies with it too; the others meet it next. Nothing decides which survivors are equivalent: they are
printed.
Needs `pip install -e ".[mutation]"`; not a part of the CI.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_item import MutationSpec, TestOutcome
from coverage import CoverageData

ROOT = Path(__file__).resolve().parent.parent
LEDGER = "tests/cost_models/test_ledger.py"
ARITHMETIC = ("Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow")
BATCH = 200
"""Test names in one call of pytest: more would not fit a command line."""


@dataclass(frozen=True)
class Mutant:
    """A change at one place, and the source line that it changes."""

    spec: MutationSpec
    line: str

    @property
    def words(self) -> str:
        """Where, what and on which line."""
        row, column = self.spec.start_pos
        kind = self.spec.operator_name.removeprefix("core/").removeprefix("Replace")
        return f"{self.spec.module_path}:{row}:{column} {kind} #{self.spec.occurrence}: {self.line.strip()}"


def wanted(operator: str) -> bool:
    """Operators that make another formula: no bitwise arithmetic (it fails by type), no decorators and exceptions."""
    name = operator.removeprefix("core/")
    if name.startswith("ReplaceBinaryOperator_"):
        return all(part in ARITHMETIC for part in name.split("_")[1:])
    return name.startswith(
        ("ReplaceComparisonOperator", "NumberReplacer", "AddNot", "ReplaceAndWithOr", "ReplaceOrWithAnd")
    )


def mutants_of(file: Path) -> Iterator[Mutant]:
    """Every mutant of a file, in a fixed order."""
    tree, lines = get_ast_from_path(file), file.read_text().splitlines()
    for name in sorted(filter(wanted, cosmic_ray.plugins.operator_names())):
        kind = cosmic_ray.plugins.get_operator(name)
        if kind.arguments():
            continue
        operator = kind()
        places = [place for node in ast_nodes(tree) for place in operator.mutation_positions(node)]
        for occurrence, (start, end) in enumerate(places):
            yield Mutant(MutationSpec(file, name, occurrence, start, end), lines[start[0] - 1])


def copied_tree() -> Path:
    """A copy of what git knows or would take up, to mutate in."""
    target = Path(tempfile.mkdtemp(prefix="mutate-"))
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def measured(packages: list[str], tests: list[str]) -> tuple[CoverageData, frozenset[str]]:
    """Which test runs which line, and the tests that fail without a mutant (measuring makes a test of speed slow)."""
    options = [*(f"--cov={name.replace('/', '.')}" for name in packages), "--cov-context=test", "--cov-report="]
    command = [sys.executable, "-m", "pytest", *tests, *options, "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
    said = subprocess.run(command, capture_output=True, text=True)
    if said.returncode not in (0, 1):
        raise SystemExit(f"error: the tests did not run\n{said.stdout}{said.stderr}")
    data = CoverageData(".coverage")
    data.read()
    return data, frozenset(re.findall(r"^(?:FAILED|ERROR) (\S+)", said.stdout, re.MULTILINE))


def covering(data: CoverageData, mutant: Mutant) -> list[str]:
    """Tests that run the mutant's line; of a line that runs at import, the tests that run any line of the file."""
    by_line = data.contexts_by_lineno(str(mutant.spec.module_path.resolve()))
    rows = range(mutant.spec.start_pos[0], mutant.spec.end_pos[0] + 1)
    here = {context for row in rows for context in by_line.get(row, ())}
    if "" in here:
        here |= {context for contexts in by_line.values() for context in contexts}
    return sorted({context.rpartition("|")[0] for context in here if context})


def dies(mutant: Mutant, tests: list[str], limit_s: float) -> bool:
    """Whether one of the tests fails on the mutant. The hand calculations go first, they are quick."""
    ordered = sorted(tests, key=lambda name: ("references" not in name, name))
    for first in range(0, len(ordered), BATCH):
        names = " ".join(f'"{name}"' for name in ordered[first : first + BATCH])
        command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {names}"
        if mutate_and_test([mutant.spec], command, limit_s).test_outcome is not TestOutcome.SURVIVED:
            return True
    return False


def run(options: argparse.Namespace) -> None:
    """Sample, judge and print."""
    files = [f for name in options.packages for f in sorted(Path(name).rglob("*.py"))]
    every = [mutant for file in files for mutant in mutants_of(file)]
    sample = random.Random(options.seed).sample(every, min(options.mutants, len(every)))
    data, failing = measured(options.packages, options.tests)
    for name in sorted(failing):
        print(f"left out, it fails without a mutant: {name}")
    began = time.monotonic()
    killed, by_ledger, survivors = 0, 0, []
    for done, mutant in enumerate(sample):
        if time.monotonic() - began > 60 * options.minutes:
            print(f"out of time after {done} of {len(sample)} mutants")
            sample = sample[:done]
            break
        tests = [name for name in covering(data, mutant) if name not in failing]
        ledger = [name for name in tests if name.startswith(options.ledger)]
        if dies(mutant, [name for name in tests if name not in ledger], options.limit):
            killed += 1
            verdict = "killed"
        elif dies(mutant, ledger, options.limit):
            by_ledger += 1
            verdict = "killed by the ledger alone"
        else:
            verdict = "survived" if tests else "survived: no test runs the line"
        if verdict != "killed":
            survivors.append(f"{verdict}: {mutant.words}")
        print(f"{done + 1:4} {verdict}: {mutant.words}", flush=True)
    print(f"\n{len(sample)} of {len(every)} mutants of {', '.join(options.packages)}, seed {options.seed}")
    print(f"killed without the ledger: {killed} ({killed / max(len(sample), 1):.0%})")
    print(f"killed with the ledger: {killed + by_ledger} ({(killed + by_ledger) / max(len(sample), 1):.0%})")
    print("\n".join(survivors))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", help="folders to mutate, such as cost_models/time")
    parser.add_argument("--mutants", type=int, default=150, help="size of the sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", nargs="+", default=["tests/cost_models"], help="tests that may cover the lines")
    parser.add_argument("--ledger", default=LEDGER, help="the test that is left out first")
    parser.add_argument(
        "--limit", type=float, default=300.0, help="seconds of one run of tests; a longer one is a kill"
    )
    parser.add_argument("--minutes", type=float, default=120.0, help="of judging, after which the sample ends")
    options = parser.parse_args()
    os.environ["PYTHONPATH"], os.environ["PYTHONDONTWRITEBYTECODE"] = "", "1"
    tree = copied_tree()
    try:
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)
        run(options)
    finally:
        os.chdir(ROOT)
        shutil.rmtree(tree)


if __name__ == "__main__":
    main()
