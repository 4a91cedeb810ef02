"""The main job: search a plan for this machine, train with it, show that the reward rises.

    python scripts/demo.py [--quick | --math] [--seed N] [--output FOLDER] [key=value ...]

Runs the same commands that a user would type, from the root of the checkout: PPO on SmolLM2-135M-Instruct with a
sentiment reward. `--quick` trains the one-million-parameter fixture instead. `--math` trains SmolLM2 by GRPO to answer
sums, and asks it 200 others before and after.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml
from arithmetic import SOLVED, score, write_problems
from scipy.stats import binomtest

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "plans" / "library" / "experiments"
SENTIMENT, QUICK, MATH = "smollm2-sentiment", "tiny-sentiment", "smollm2-arithmetic"
LEAST_POINTS, MOST_P = 10.0, 0.01
"""What the answers to held-out sums must gain, percentage points, and how unlikely it may be by chance."""


def main() -> int:
    """Set up the model, search, run, summarise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_const", dest="name", const=QUICK, help="train the tiny fixture model")
    which.add_argument("--math", action="store_const", dest="name", const=MATH, help="train on sums, by their answers")
    parser.add_argument("--seed", type=int, default=1, help="of weights, problems and responses")
    parser.add_argument("--output", type=Path, help="where everything goes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the run file")
    options = parser.parse_args()
    name = options.name or SENTIMENT
    output = (options.output or ROOT / "runs" / name).resolve()
    began = time.monotonic()
    run = prepare(name, output, options.seed)
    print(f"set-up took {time.monotonic() - began:.0f} s", flush=True)
    began = time.monotonic()
    plan = output / "plan.json"
    call("realplan", "search", "--run", str(run), "--cluster", "local-cpu", "--seconds", "5", "-o", str(plan))
    call("realrun", str(plan), f"output={output}", *options.overrides)
    print(f"search and training took {time.monotonic() - began:.0f} s")
    return solved(output) if name == MATH else summary(output)


def prepare(name: str, output: Path, seed: int) -> Path:
    """Write the run file with absolute paths beside the outputs, the problems, and the weights where they are
    missing."""
    settings = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())
    output.mkdir(parents=True, exist_ok=True)
    settings["seed"] = seed
    if name != QUICK:
        from runtime.weights.smollm import prepare_smollm2

        prepare_smollm2(ROOT / settings["weights"])
    else:
        settings["data"]["source"] = str(ROOT / settings["data"]["source"])
    if name == MATH:
        train, held_out = output / "train.jsonl", output / "held-out.jsonl"
        write_problems(train, held_out, seed)
        settings["data"]["source"], settings["evaluation"]["source"] = str(train), str(held_out)
        settings["reward"] = f"{Path(__file__).with_name('arithmetic.py')}:{score.__name__}"
    settings["weights"] = settings["workload"]["models"]["actor"] = str(ROOT / settings["weights"])
    path = output / "experiment.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def call(name: str, *arguments: str) -> None:
    """Run one of the project's commands as a user would; its failure is ours."""
    print(f"\n$ {name} {shlex.join(arguments)}", flush=True)
    command = Path(sys.executable).with_name(name)
    code = subprocess.run([str(command), *arguments], cwd=ROOT).returncode
    if code:
        raise SystemExit(code)


def summary(output: Path) -> int:
    """Print the reward of the first and the last quarter; fail when it did not rise beyond its noise."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["critic/score/mean"] for row in rows]
    quarter = max(1, len(rewards) // 4)
    first, last = rewards[:quarter], rewards[-quarter:]
    gain = statistics.mean(last) - statistics.mean(first)
    noise = sum(statistics.variance(part) / len(part) for part in (first, last)) ** 0.5 if quarter > 1 else 0.0
    print(f"\nreward: first quarter {statistics.mean(first):+.3f}, last quarter {statistics.mean(last):+.3f}")
    print(f"gain {gain:+.3f}, {gain / noise if noise else float('inf'):.1f} standard errors")
    made(output)
    return 0 if gain > 2 * noise else 1


def solved(output: Path) -> int:
    """Print how many held-out problems were solved before and after; fail when that is too little or may be chance.

    McNemar's exact test: of the problems that were solved once only, each side would have half by chance.
    """
    lines = [json.loads(line) for line in (output / "evaluation.jsonl").read_text().splitlines()]
    before, after = ([score >= SOLVED for score in line["scores"]] for line in (lines[0], lines[-1]))
    won = sum(new and not old for old, new in zip(before, after, strict=True))
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    points = 100.0 * (won - lost) / len(before)
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    print(f"\nheld-out problems solved: {sum(before)} of {len(before)} before, {sum(after)} after")
    print(f"gain {points:+.1f} points, {won} won and {lost} lost, McNemar p = {p:.1e}")
    made(output)
    return 0 if points >= LEAST_POINTS and p < MOST_P else 1


def made(output: Path) -> None:
    """Say where to look."""
    for name in ("plan.json", "metrics.jsonl", "timeline.json", "report.html", "actor"):
        print(f"  {output / name}")


if __name__ == "__main__":
    raise SystemExit(main())
