"""Broken files and options of every kind: each is refused by one error that names its place and a legal value.

Inputs are legal ones with one to three random faults, from a seed. CI tries 2,000; `--fuzz 50000` tries more. What is
accepted must mean the same as the data that a plain parser reads: nothing is ignored, nothing is guessed.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from plan_cases import tiny_plan

from planner.space.limits import parse_limits
from plans.checks import check_plan
from plans.codec import dump_plan, load_plan, sealed
from plans.errors import RealplanError
from plans.graphfile import load_graph
from plans.huggingface import config_from_spec, spec_from_folder
from plans.library import load_model
from plans.plan import Estimate
from plans.runfile import RunFile, load_run
from plans.timeline import load_timeline
from runtime.batches.data import read_prompts

SECONDS = 20.0
LEGAL_HINTS = 0.9
CALLS = ["actor_generate", "reward_infer", "actor_train"]
GRAPH = """name: best-of-n
calls:
- {name: actor_generate, kind: generate, model: actor, inputs: [prompts], outputs: [sequences]}
- {name: score, kind: function, inputs: [sequences], outputs: [rewards], seconds_per_sample: 0.1}
- {name: actor_train, kind: train_step, model: actor, inputs: [sequences, rewards]}
"""
RUN = """weights: random
iterations: 5
seed: 1
sampling: {temperature: 0.7, top_k: 50}
actor: {lr: 1.0e-4, beta1: 0.9, clip: 1.0}
ppo:
  kl_coefficient: 0.02
workload: {algorithm: ppo, batch_size: 32, dtype: fp32, models: {actor: llama-7b}}
"""
ROWS = "".join(json.dumps({"prompt": f"the movie number {i}", "id": i}) + "\n" for i in range(20))
TABLE = "id,prompt\n" + "".join(f'{i},"one, two {i}"\n' for i in range(20))
ODD_VALUES = (
    "null", "true", "[]", "{}", '""', '"x"', "0", "-1", "010", "0x10", "1_000", "1.5", "1e400", "-1e400", "NaN",
    "Infinity", ".inf", ".nan", "1e-320", "9" * 25, "9" * 5000, "2020-01-01", '"' + "y" * 300 + '"', "yes", "*a",
    "&a [*a]", "!!int x",
    "[" * 80 + "]" * 80, '{"a": 1, "a": 2}', '"\\ud83d"', "1:30",
)  # fmt: skip
ODD_TEXT = (
    "\x00",
    "\x1b[31m",
    "\t",
    "\r",
    "\ufeff",
    "\u2028",
    "'",
    '"',
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    "#",
    "//",
    "/*",
    "\\",
)
ODD_BYTES = (b"\xff", b"\xe9", b"\x00", b"\xef\xbb\xbf", b"\xed\xa0\xbd")
SCALAR = re.compile(r'(?<=[:,\[ ])\s*("(?:[^"\\\n]|\\.)*"|[\w.+-]+)(?=\s*[,}\]\n])')
KEY = re.compile(r'"?([A-Za-z_]\w+)"?(?=\s*:)')


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name, a legal text, how it is read, and whether that is what it says."""

    name: str
    text: str
    read: Callable[[Path], Any]
    same: Callable[[Any, str], bool] | None = None


def same_run(run: Any, text: str) -> bool:
    """A run file that was accepted has no key twice, and none that nobody reads."""
    root = yaml.compose(text, Loader=yaml.CSafeLoader)
    keys = [key.value for key, _ in root.value] if root is not None and root.value else []
    return isinstance(run, RunFile) and len(set(keys)) == len(keys) and set(keys) <= set(RunFile.model_fields)


def same_rows(rows: Any, text: str) -> bool:
    """Rows that were accepted are the prompts of the lines."""
    return list(rows) == [
        json.loads(line)["prompt"] for line in text.removeprefix("\ufeff").split("\n") if line.strip()
    ]


def kinds() -> list[Kind]:
    """Every kind of text file that a person writes or downloads."""
    plan = tiny_plan(2, "d2 t1 p1")
    figures = Estimate(
        iteration_s=9.5, latency_s=12.0, calls_s={"actor_train": 3.0}, peak_gib=70.0, peak_at="actor_train, rank 0",
        host_gib=1.0, engine="e", of="",
    )  # fmt: skip
    span = {"name": "actor_train", "kind": "call", "iteration": 0, "start_s": 0.5, "end_s": 1.5, "ranks": [0, 1]}
    timeline = {"format": "realplan-timeline/1", "source": "measured", "period_s": 2.0, "spans": [span] * 3}
    config = config_from_spec(load_model("qwen2.5-7b")) | {"use_cache": True, "torch_dtype": "bfloat16"}
    return [
        Kind("plan.json", dump_plan(plan.with_estimate(sealed(plan, figures))), lambda p: check_plan(load_plan(p))),
        Kind("config.json", json.dumps(config, indent=1), spec_from_folder),
        Kind("run.yaml", RUN, load_run, same_run),
        Kind("graph.yaml", GRAPH, load_graph),
        Kind("timeline.json", json.dumps(timeline, indent=1), load_timeline),
        Kind("rows.jsonl", ROWS, read_prompts, same_rows),
        Kind("table.csv", TABLE, read_prompts),
    ]


def broken(text: str, rng: random.Random) -> bytes:
    """A text with one to three faults: values, keys, lines, characters, bytes, cuts and repetitions."""
    for _ in range(rng.randint(1, 3)):
        fault = rng.randrange(8)
        values, keys = list(SCALAR.finditer(text)), list(KEY.finditer(text))
        at = rng.randrange(len(text) + 1)
        if fault <= 2 and values:
            found = rng.choice(values)
            text = text[: found.start(1)] + rng.choice(ODD_VALUES) + text[found.end(1) :]
        elif fault == 3 and keys:
            found = rng.choice(keys)
            text = (
                text[: found.start(1)]
                + rng.choice((found[1] + "s", found[1][:-1], "x" * 90, ""))
                + text[found.end(1) :]
            )
        elif fault == 4:
            lines = text.splitlines(keepends=True)
            i = rng.randrange(len(lines)) if lines else 0
            text = "".join(lines[:i] + lines[i : i + 1] * rng.choice((0, 2)) + lines[i + 1 :])
        elif fault == 5:
            text = text[:at] + rng.choice(ODD_TEXT) + text[at:]
        elif fault == 6:
            text = text[:at] if rng.random() < 0.5 else text[:at] + text[at + rng.randint(1, 20) :]
        else:
            data = text.encode("utf-8", "surrogatepass")
            return data[:at] + rng.choice(ODD_BYTES) + data[at:]
    return text.encode("utf-8", "surrogatepass")


def broken_rule(rng: random.Random) -> str:
    """A rule of `--pin` with a fault somewhere."""
    call = rng.choice([*CALLS, "*", "actor_trian", ""])
    field = rng.choice(["tp", "dp", "mesh", "recompute", "tpp", "gpus", ""])
    value = rng.choice(["4", "-1", "9" * 5000, "full", "x", "", "4.5", "²"])
    return f"{call}.{field}{rng.choice(['=', '>', '<=', '!=', '=>', ''])}{value}"


def broken_override(rng: random.Random) -> str:
    """A `key=value` of realrun with a fault somewhere."""
    key = rng.choice(
        ["iterations", "actor.lr", "actor.beta1", "seed", "ppo", "itertions", "a.b.c", "", "sampling.top_p"]
    )
    return key + rng.choice(["=", "", "=="]) + rng.choice(ODD_VALUES)


def answer(read: Callable[[], Any]) -> tuple[str, str] | None:
    """Message and hint of the error that reading raises, None when it succeeds; any other exception is a failure."""
    began = time.monotonic()
    try:
        read()
        return None
    except RealplanError as error:
        message, _, hint = str(error).partition("hint: ")
        return message, hint
    finally:
        assert time.monotonic() - began < SECONDS


def test_broken_files(tmp_path: Path, fuzz: int) -> None:
    every = kinds()
    refused: Counter[str] = Counter()
    hinted: Counter[str] = Counter()
    for number in range(fuzz * 3 // 4):
        rng = random.Random(f"file {number}")
        kind = every[number % len(every)]
        content = broken(kind.text, rng)
        path = tmp_path / kind.name
        path.write_bytes(content)
        found: list[Any] = []
        said = answer(lambda kind=kind, path=path, found=found: found.append(kind.read(path)))  # type: ignore[misc]
        if said is None:
            assert kind.same is None or kind.same(found[0], content.decode()), content
            continue
        message, hint = said
        refused[kind.name] += 1
        hinted[kind.name] += bool(hint.strip())
        assert str(path) in message, message
        empty = not content.strip() or "the file has no rows" in message
        deep = "too deep" in message or "60 deep" in message
        assert empty or deep or re.search(rf"{re.escape(path.name)}:\d+:\d+: ", message), (message, content)
    for kind in every:
        assert refused[kind.name] and hinted[kind.name] >= LEGAL_HINTS * refused[kind.name], kind.name


def test_broken_options(tmp_path: Path, fuzz: int) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    for number in range(fuzz // 4):
        rng = random.Random(f"option {number}")
        if number % 2:
            rule = broken_rule(rng)
            said = answer(lambda rule=rule: parse_limits([rule], [], [], "", CALLS))  # type: ignore[misc]
        else:
            rule = broken_override(rng)
            said = answer(lambda rule=rule: load_run(tmp_path / "run.yaml", [rule]))  # type: ignore[misc]
        assert said is None or (said[0].strip() and said[1].strip()), (rule, said)


def test_unbroken_files_are_read(tmp_path: Path) -> None:
    for kind in kinds():
        path = tmp_path / kind.name
        path.write_text(kind.text)
        kind.read(path)
