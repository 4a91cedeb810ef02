"""What docs/how-to-add.md promises: each usual addition, made in a copy of the tree in so few files, works."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_docs import MOST_FILES, ROOT

Edit = Callable[[str], str]
PLAN = ROOT / "tests" / "fixtures" / "before" / "ppo-tail.json"


def after(mark: str, addition: str) -> Edit:
    """Insert behind the first place where `mark` stands."""

    def edit(text: str) -> str:
        assert mark in text, f"`{mark}` is not there"
        return text.replace(mark, mark + addition, 1)

    return edit


def entry(path: str, value: object) -> Edit:
    """A new entry of a JSON file, `gpus/name`; a text names the entry beside it that is copied."""
    part, name = path.split("/")

    def edit(text: str) -> str:
        document = json.loads(text)
        document[part][name] = document[part][value] if isinstance(value, str) else value
        return json.dumps(document)

    return edit


def new(text: str) -> Edit:
    return lambda _: text


RECORD = '        Algorithm(name="mine", meaning="", graph=lambda variant: _critic_free("mine", variant)),\n'
ADVANTAGES = "from runtime.algorithms.groups import rloo\n\nmine = rloo\n"
COMMAND = """

def hello() -> None:
    \"\"\"Say hello.\"\"\"
    from planner.cli.commands.hello import hello_command

    raise typer.Exit(hello_command())
"""
ADDITIONS: dict[str, dict[str, Edit]] = {
    "GPU kind": {
        "plans/library/hardware.json": lambda text: entry("clusters/my-gpu", {"gpu": "my-gpu", "gpus_per_node": 8,
            "inter_node_gbps": 50})(entry("gpus/my-gpu", "h100-80gb-sxm")(text)),
        "cost_models/library/kernels/my-gpu.json": new("FROM h100-80gb-sxm"),
        "cost_models/tables/kernels.py": after("_TABLES = {", '\n    "my-gpu": "my-gpu",'),
    },
    "model family": {
        "plans/families.py": lambda text: after('"llama": Llama,', '\n    "my_llama": MyLlama,')(
            after("    mlp_bias: Off = False\n\n", '\nclass MyLlama(Llama):\n    """Mine."""\n\n'
                  '    ARCHITECTURE = "MyLlamaForCausalLM"\n\n')(text)),
    },
    "algorithm": {
        "plans/algorithms.py": after("    for record in (\n", RECORD),
        "runtime/algorithms/mine.py": new(ADVANTAGES),
        "runtime/algorithms/table.py": lambda text: after("] = {\n", '    "mine": mine,\n')(
            after("import grpo, rloo\n", "from runtime.algorithms.mine import mine\n")(text)),
    },
    "cost term": {
        "cost_models/terms.py": lambda text: text.replace('"accumulation": ', '"my_term": "by hand", "accumulation": '),
        "cost_models/time/training.py": after("accumulation(machine, rank_params(step.spec, c))\n",
            '    terms["my_term"] = 0.5 + 0.0 * terms["accumulation"]\n'),
    },
    "engine": {"cost_models/library/engines.json": entry("engines/my-engine", "megatron-te")},
    "command": {
        "planner/cli/lists.py": lambda text: text.replace("COMMANDS = (", COMMAND + "\n\nCOMMANDS = (hello, "),
        "planner/cli/commands/hello.py": new("def hello_command() -> int:\n    print('hello')\n    return 0\n"),
    },
}  # fmt: skip
WORKS = f"""
from pathlib import Path
from cost_models.engines.engine import NamedEngine
from cost_models.estimate import cost_plan
from plans.algorithms import ALGORITHMS, algorithm_graph
from plans.codec import load_plan
from plans.huggingface import spec_from_config
from plans.library import load_cluster
from runtime.algorithms.groups import rloo
from runtime.algorithms.table import ADVANTAGES
from cost_models.tables.kernels import kernel_table
from planner.cli.app import app

plan = load_plan(Path({str(PLAN)!r}))
cost = cost_plan(plan, NamedEngine("my-engine"))
assert cost.terms["actor_train"]["my_term"] == 0.5 * plan.workload.minibatches and cost.iteration_s > 1
assert load_cluster("my-gpu", gpus=16).gpu.name == "my-gpu" and kernel_table("my-gpu") is not None
sizes = dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=128, vocab_size=256)
assert spec_from_config({{"model_type": "my_llama", **sizes}}, "x").layers == 2
assert algorithm_graph("mine").trainers == {{"actor": "actor_train"}} and ADVANTAGES["mine"] is rloo
app(["hello"], standalone_mode=False)
"""


def test_the_usual_additions_touch_few_files_and_work(tmp_path: Path) -> None:
    assert ADDITIONS.keys() == MOST_FILES.keys()
    for package in ("plans", "cost_models", "planner", "runtime"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for what, edits in ADDITIONS.items():
        assert len(edits) <= MOST_FILES[what], what
        for name, edit in edits.items():
            file = tmp_path / name
            file.write_text(edit(file.read_text() if file.exists() else ""))
    kernels = tmp_path / "cost_models" / "library" / "kernels"
    shutil.copyfile(next(kernels.glob("h100*")), kernels / "my-gpu.json")
    done = subprocess.run([sys.executable, "-c", WORKS], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "hello" in done.stdout


@pytest.mark.parametrize("what", MOST_FILES)
def test_the_page_names_the_files_of_an_addition(what: str) -> None:
    page = (ROOT / "docs" / "how-to-add.md").read_text()
    (section,) = (part for part in page.split("\n## ") if part.startswith((f"A {what}", f"An {what}")))
    for name in ADDITIONS[what]:
        assert name in section or f"{Path(name).parent}/" in section, name
