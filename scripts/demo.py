"""The main job: search a plan for this machine, train with it, show that the reward rises.

    python scripts/demo.py [--quick] [--output FOLDER] [key=value ...]

Runs the same commands that a user would type, from the root of the checkout. `--quick` trains the one-million-parameter
fixture instead of SmolLM2-135M-Instruct.
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

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "plans" / "library" / "experiments"


def main() -> int:
    """Set up the model, search, run, summarise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="train the tiny fixture model instead")
    parser.add_argument("--output", type=Path, help="where everything goes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the run file")
    options = parser.parse_args()
    name = "tiny-sentiment" if options.quick else "smollm2-sentiment"
    output = (options.output or ROOT / "runs" / name).resolve()
    began = time.monotonic()
    run = prepare(name, output, options.quick)
    print(f"set-up took {time.monotonic() - began:.0f} s", flush=True)
    began = time.monotonic()
    plan = output / "plan.json"
    call("realplan", "search", "--run", str(run), "--cluster", "local-cpu", "--seconds", "5", "-o", str(plan))
    call("realrun", str(plan), f"output={output}", *options.overrides)
    print(f"search and training took {time.monotonic() - began:.0f} s")
    return summary(output)


def prepare(name: str, output: Path, quick: bool) -> Path:
    """Write the run file with absolute paths beside the outputs, and the weights where they are missing."""
    settings = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())
    if not quick:
        from runtime.weights.smollm import prepare_smollm2

        prepare_smollm2(ROOT / settings["weights"])
    else:
        settings["data"]["source"] = str(ROOT / settings["data"]["source"])
    settings["weights"] = settings["workload"]["models"]["actor"] = str(ROOT / settings["weights"])
    output.mkdir(parents=True, exist_ok=True)
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
    for name in ("plan.json", "metrics.jsonl", "timeline.json", "actor"):
        print(f"  {output / name}")
    return 0 if gain > 2 * noise else 1


if __name__ == "__main__":
    raise SystemExit(main())
