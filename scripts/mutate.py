"""Which wrong formulas the tests let pass: a seeded sample of mutants of some folders, each against the tests that
run its line, in a copy of the tree.

    scripts/mutate.sh cost_models/time cost_models/memory plans planner/search --mutants 150 --seed 0

Cosmic Ray makes the mutants: another number, operator or comparison at one place. The tests run once under coverage;
a mutant then meets the tests of its line, the quickest first, in a forked child, until one fails: those beside the
ledger first, the ledger next. Survivors that are held to be equivalent stand with their reasons in
`scripts/mutation/equivalent.yaml`; `--report` writes what was found beside them.
Needs `pip install -e ".[mutation]"`; not a part of the CI.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from mutation import forks
from mutation.mutants import Mutant, sample

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = Path(__file__).resolve().parent / "mutation" / "equivalent.yaml"
LEDGER = "tests/cost_models/test_ledger.py"
TESTS = [
    "tests/plans",
    "tests/cost_models",
    "tests/planner",
    "tests/runtime/test_rope.py",
    "tests/runtime/test_data.py",
]
"""Those that start no ranks; most of them need no torch."""
COMPILED = "planner.search.compiled"
COMPILED_TESTS = [f"tests/planner/test_{name}.py" for name in ("schedule", "walk", "search_values")]
"""What a file with compiled functions imports, and the tests that are quick enough without the compiler to meet it."""
TIERS_S = (0.3, 3.0)
"""Seconds of the tests that a child collects first, and next: most mutants die by the first."""


@dataclass(frozen=True)
class Verdict:
    """A mutant and the test that fails on it, "" where none does; `tests`: how many ran or would have run."""

    mutant: Mutant
    killer: str
    tests: int

    @property
    def by_ledger(self) -> bool:
        """Whether only the ledger sees it."""
        return self.killer.startswith(LEDGER)


@dataclass(frozen=True)
class Judge:
    """What decides on a mutant: the tests measured, those that killed it the last time, and the bounds of one try."""

    measured: forks.Measured
    interpreted: forks.Measured
    last: dict[str, str]
    budget_s: float
    limit_s: float
    trusts: bool

    def covering(self, mutant: Mutant) -> list[str]:
        """Tests that run the mutant's line, the quickest first; of a line that runs at import, those of its file and
        then those of its folder, since what it declares is used elsewhere."""
        place, measured = mutant.place, self.of(mutant)
        lines = measured.lines.get(place.file, {})
        here = {name for row in range(place.first_line, place.last_line + 1) for name in lines.get(str(row), ())}
        usable = set(measured.seconds) - set(measured.failing)
        if "" not in here:
            return self.quickest(measured, here & usable)
        near = {name for names in lines.values() for name in names} & usable
        folder = str(Path(place.file).parent)
        far = {
            name
            for file, found in measured.lines.items()
            if file.startswith(folder)
            for names in found.values()
            for name in names
        }
        return self.quickest(measured, near) + self.quickest(measured, (far or usable) & usable - near)

    @staticmethod
    def quickest(measured: forks.Measured, tests: set[str]) -> list[str]:
        """In the order of their seconds."""
        return sorted(tests, key=lambda name: (measured.seconds[name], name))

    def of(self, mutant: Mutant) -> forks.Measured:
        """The measurement that sees the mutant's file."""
        return self.interpreted if COMPILED in Path(mutant.place.file).read_text() else self.measured

    def batches(self, mutant: Mutant, tests: list[str]) -> list[list[str]]:
        """The last killer alone, some quick tests, and more up to the budget."""
        last = self.last.get(mutant.name, "")
        spent = 0.0
        batches: list[list[str]] = [[name for name in tests if name == last], *([] for _ in TIERS_S), []]
        for name in tests:
            seconds = self.of(mutant).seconds[name]
            if spent + seconds > self.budget_s and any(batches):
                continue
            spent += seconds
            if name != last:
                batches[1 + sum(spent > limit for limit in TIERS_S)].append(name)
        return batches

    def judge(self, mutant: Mutant) -> Verdict:
        """Try the tests beside the ledger, then the ledger."""
        tests = self.covering(mutant)
        before = self.last.get(mutant.name, "")
        if self.trusts and before and not before.startswith(LEDGER):
            return Verdict(mutant, before, len(tests))
        ledger = [name for name in tests if name.startswith(LEDGER)]
        text, killer = mutant.place.source(), ""
        # Compiled code is kept on disk by the file's date, which a mutant does not change.
        interpreted = COMPILED in text
        for group in ([name for name in tests if name not in ledger], ledger):
            if group and not killer:
                killer = forks.first_failure(
                    mutant.place.file, text, self.batches(mutant, group), limit_s=self.limit_s,
                    processor_s=int(2 * self.budget_s + 30), interpreted=interpreted,
                )  # fmt: skip
                if killer == "hang or crash" and group is ledger:
                    killer = f"{LEDGER} ({killer})"
        return Verdict(mutant, killer, len(tests))


def copied_tree() -> Path:
    """A copy of what git knows or would take up, to mutate in."""
    target = Path(tempfile.mkdtemp(prefix="mutate-"))
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    for found in ROOT.glob("*/*/__pycache__/*.nb[ci]"):  # numba's, which knows a file by its date
        (target / found.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy2(found, target / found.relative_to(ROOT))
    return target


def equivalents() -> dict[str, str]:
    """Mutants that no test can kill, and why."""
    listed = yaml.safe_load(EQUIVALENT.read_text()) if EQUIVALENT.exists() else []
    return {name: entry["why"] for entry in listed or [] for name in entry["mutants"]}


def summary(folder: str, total: int, verdicts: Sequence[Verdict], reasons: dict[str, str]) -> str:
    """A row of the report's table."""
    same = [v for v in verdicts if not v.killer and v.mutant.name in reasons]
    rest = len(verdicts) - len(same)
    killed = sum(bool(v.killer) for v in verdicts)
    alone = sum(bool(v.killer) and not v.by_ledger for v in verdicts)
    shares = " | ".join(f"{n} ({n / max(rest, 1):.1%})" for n in (alone, killed))
    return f"| `{folder}` | {total} | {len(verdicts)} | {len(same)} | {shares} | {rest - killed} |"


def report(rows: Sequence[str], survivors: Sequence[Verdict], reasons: dict[str, str], seed: int) -> str:
    """The page about the last run."""
    head = ("| folder | mutants | sampled | equivalent | killed without the ledger | with it | survivors |",
            "| --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
    lines = ["# Mutants", "", f"Written by `scripts/mutate.sh --seed {seed} --report`. Shares are of those that are",
             "not equivalent; `equivalent.yaml` gives the reasons.", "", *head, *rows]  # fmt: skip
    for title, wanted in (("Survivors", False), ("Held to be equivalent", True)):
        chosen = [v.mutant.name for v in survivors if (v.mutant.name in reasons) is wanted]
        lines += ["", f"## {title}", ""]
        lines += [f"* `{name}`" + (f"\n  {reasons[name]}" if wanted else "") for name in chosen] or ["None."]
    return "\n".join(lines) + "\n"


def doubted(judge: Judge, verdicts: Sequence[Verdict]) -> list[str]:
    """Tests that killed and fail without a mutant as well, each tried once."""
    killers = sorted({v.killer for v in verdicts} & set(judge.measured.seconds))
    found = []
    while killers:
        name = forks.first_failure("unchanged.py", "", [killers], processor_s=3600, limit_s=3600, interpreted=False)
        if not name:
            break
        found.append(name)
        killers = [other for other in killers if other != name] if name in killers else []
    return found


def measurements(options: argparse.Namespace) -> list[forks.Measured]:
    """Which test runs which line: as tests run, and without the compiler."""
    if options.measured and options.measured.exists():
        return [forks.Measured(**part) for part in json.loads(options.measured.read_text())]
    found = [forks.measured(options.tests, options.folders, 7200, interpreted=False)]
    quick = [name for name in options.interpreted if Path(name.split("::")[0]).exists()]
    compiled = any(COMPILED in file.read_text() for folder in options.folders for file in Path(folder).rglob("*.py"))
    found.append(forks.measured(quick, options.folders, 7200, interpreted=True) if compiled else forks.Measured())
    if options.measured:
        options.measured.write_text(json.dumps([vars(part) for part in found]))
    return found


def run(options: argparse.Namespace) -> str:
    """Sample, judge and say what was found."""
    seen, slow = measurements(options)
    print(f"{len(seen.seconds)} tests, {sum(seen.seconds.values()):.0f} s; left out, they fail: {seen.failing}")
    forks.preload(seen.modules)
    last = json.loads(options.results.read_text()) if options.results and options.results.exists() else {}
    judge = Judge(seen, slow, last, options.budget, options.limit, options.trust)
    reasons, rows, verdicts = equivalents(), [], []
    for folder in options.folders:
        drawn, total = sample(sorted(map(str, Path(folder).rglob("*.py"))), options.mutants, options.seed)
        here = []
        for mutant in drawn:
            here.append(judge.judge(mutant))
            last[mutant.name] = here[-1].killer
            if options.results:
                options.results.write_text(json.dumps(last, indent=0))
            said = here[-1].killer or f"SURVIVED {here[-1].tests} tests"
            print(f"{len(here):4} {said} <- {mutant.name}", flush=True)
        rows.append(summary(folder, total, here, reasons))
        verdicts += here
        print(rows[-1], flush=True)
    for name in doubted(judge, verdicts):
        print(f"doubtful, it fails without a mutant: {name}")
    return report(rows, [v for v in verdicts if not v.killer], reasons, options.seed)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders to mutate, such as cost_models/time")
    parser.add_argument("--mutants", type=int, default=150, help="size of the sample of each folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", nargs="+", default=TESTS)
    parser.add_argument(
        "--interpreted", nargs="+", default=COMPILED_TESTS, help="tests of files with compiled functions"
    )
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of tests that one mutant meets at most")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds until a mutant counts as a hang, a kill")
    parser.add_argument("--measured", type=Path, help="file that keeps which test runs which line, for the next run")
    parser.add_argument("--results", type=Path, help="file that keeps which test killed which mutant, to try it first")
    parser.add_argument("--trust", action="store_true", help="what a test beside the ledger killed, stays killed")
    parser.add_argument("--report", type=Path, help="file to write what was found to")
    options = parser.parse_args()
    for name in ("measured", "results", "report"):
        if getattr(options, name):
            setattr(options, name, getattr(options, name).resolve())
    return options


def main() -> None:
    """Work in a copy of the tree."""
    options, tree = parsed(), copied_tree()
    os.environ["PYTHONPATH"] = str(tree)
    sys.path.insert(0, str(tree))
    try:
        os.chdir(tree)
        said = run(options)
        print(said)
        if options.report:
            options.report.write_text(said)
    finally:
        os.chdir(ROOT)
        shutil.rmtree(tree)


if __name__ == "__main__":
    main()
