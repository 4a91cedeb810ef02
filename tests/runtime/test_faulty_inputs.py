"""Faulty data and rewards, listed: each has one clear message with file and line, or with the sample."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plan_cases import TINY

from plans.errors import RealplanError
from plans.runfile import Data
from runtime.batches.datasets import DataSet, read_data
from runtime.batches.rewards import ProcessLimits, Reward, RewardError
from runtime.batches.tokenizer import Tokenizer

PROMPTS, RESPONSES = ["p", "q", "r"], ["first", "second", "third one"]
LIMITS = ProcessLimits(seconds=60, memory_gib=1)
ROW = b'{"prompt": "x"}\n'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"

FILES: dict[str, tuple[str, bytes, list[str]]] = {
    "broken line 2": ("a.jsonl", ROW + b'{"prompt": "x"\n', ["a.jsonl:2:15: not JSON", "comma"]),
    "broken line 17": ("a.jsonl", ROW * 16 + b'{"prompt" "x"}\n', ["a.jsonl:17:11: not JSON"]),
    "broken line behind CRLF": ("a.jsonl", b'{"prompt": "x"}\r\n' * 3 + b"{\r\n", ["a.jsonl:4:", "not JSON"]),
    "broken line behind a BOM": ("a.jsonl", b'\xef\xbb\xbf{"prompt" "x"}\n', ["a.jsonl:1:11: not JSON"]),
    "a broken line of 1 MB": ("a.jsonl", ROW + b'{"prompt": "' + b"y" * 2**20 + b"\n", ["a.jsonl:2:", "not JSON"]),
    "not UTF-8": ("a.jsonl", ROW + b'{"prompt": "caf\xe9"}\n', ["a.jsonl:2:16: byte 0xe9 is not UTF-8", "iconv"]),
    "UTF-16": ("a.csv", "prompt\nx\n".encode("utf-16"), ["a.csv:1:1: ", "iconv -f UTF-16"]),
    "half a character": ("a.jsonl", ROW + b'{"prompt": "was \\ud83d bad"}\n', ["a.jsonl:2:17: `\\ud83d` is half"]),
    "a key twice": ("a.jsonl", b'{"prompt": "x", "prompt": "y"}\n', ["a.jsonl:1:17: key `prompt` is given twice"]),
    "a column twice": ("a.csv", b"prompt,prompt\nx,1\n", ["a.csv:1:1: column `prompt` stands twice"]),
    "a number for a prompt": ("a.jsonl", b'{"id": 1, "prompt": 7}\n', ["a.jsonl:1:11: `prompt` is 7"]),
    "too many fields": ("a.csv", b"prompt,b\nx,1,2\n", ["a.csv:2:1: 3 fields, and the first line names 2"]),
    "a list for a row": ("a.jsonl", ROW + b'\n["x"]\n', ["a.jsonl:3", "a list, not an object"]),
    "no such column": ("a.jsonl", b'{"text": "x"}\n', ["a.jsonl:1", "`prompt` is None"]),
    "no such column of a table": ("a.csv", b"text\nx\n", ["a.csv:1", "no column `prompt`", "text"]),
    "an empty prompt": ("a.jsonl", b'{"prompt": " "}\n', ["a.jsonl:1", "not empty"]),
    "an empty prompt in a table": ("a.csv", b"prompt,b\nx,1\n,2\n", ["a.csv:3", "`prompt` is ''"]),
    "nothing": ("a.jsonl", b"", ["a.jsonl", "no rows"]),
    "no known kind": ("a.txt", b"x", ["no known kind", "hint:"]),
    "no Parquet": ("a.parquet", b"PAR1 nothing", ["a.parquet", "no Parquet"]),
    "a pointer of git-LFS": ("a.jsonl", LFS, ["a.jsonl:1:1: this is a git-LFS pointer", "git lfs pull"]),
    "a binary file": ("a.jsonl", bytes(range(128, 256)), ["a.jsonl:1:1: byte 0x80 is not UTF-8"]),
    "a conversation without a message": ("a.jsonl", b'{"messages": []}\n', ["a.jsonl:1:2: `messages`: it is []"]),
    "a message of nobody": (
        "a.jsonl",
        b'{"messages": [{"role": "boss", "content": "x"}]}\n',
        ["a.jsonl:1:", "`messages`: message 0 is"],
    ),
    "an answer column that is missing": (
        "answer.jsonl",
        ROW,
        ["answer.jsonl:1:1: no column `solution`", "data.answer"],
    ),
    "a template that raises": (
        "raises.jsonl",
        b'{"messages": [{"role": "user", "content": "x"}]}\n',
        ["raises.jsonl:1:", "roles must alternate"],
    ),
    "a template with a mistake": (
        "mistake.jsonl",
        b'{"messages": [{"role": "user", "content": "x"}]}\n',
        ["chat_template.jinja:1:1", "cannot be read"],
    ),
    "no template": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "x"}]}\n',
        ["no chat template", "data.chat=false"],
    ),
}
TEMPLATES = {"raises": "{{ raise_exception('roles must alternate') }}", "mistake": "{% for x in %}"}


def data_of(source: Path, folder: Path) -> DataSet:
    answer = "solution" if source.stem == "answer" else ""
    template = TEMPLATES.get(source.stem)
    model = TINY
    if template is not None:
        model = folder / "model"
        shutil.copytree(TINY, model)
        (model / "chat_template.jinja").write_text(template)
    data = Data(source=str(source), answer=answer)
    return read_data(data, (), Tokenizer.of_folder(TINY), model, prompt_tokens=8, batch_size=2, seed=0)[0]


@pytest.mark.parametrize(("name", "content", "words"), FILES.values(), ids=FILES.keys())
def test_faulty_data_name_file_and_line(name: str, content: bytes, words: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RealplanError) as caught:
        data_of(tmp_path / name, tmp_path)
    said = str(caught.value)
    assert all(word in said for word in words) and len(said) < 2_000, said[:3_000]


def test_a_long_line_that_is_whole_is_read_and_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "the movie was"}, {"prompt": "good " * 2**18}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = data_of(tmp_path / "a.jsonl", tmp_path)
    assert data.prompts.prompts == ("the movie was",) and data.note.startswith("1 of 2 prompts are left out")


REWARDS: dict[str, tuple[str, list[str]]] = {
    "raises": (
        "def f(prompts, responses):\n    for r in responses:\n        if r == 'second': raise KeyError('no score')\n"
        "    return [0.0] * len(responses)",
        ["mine.py:f` raised KeyError: 'no score'", "sample 1: prompt 'q', response 'second'", "mine.py:3"],
    ),
    "exits": ("def f(responses): exec('exit()')", ["called exit(None)", "sample 0", "mine.py:1"]),
    "dies": (
        "import os\ndef f(responses):\n    if 'third one' in responses: os._exit(3)\n    return [0.0] * len(responses)",
        ["the process of reward", "ended (exit code 3)", "sample 2: prompt 'r'"],
    ),
    "crashes": (
        "import os\ndef f(responses):\n    if 'second' in responses: os.kill(os.getpid(), 11)\n"
        "    return [0.0] * len(responses)",
        ["ended (SIGSEGV)", "sample 1"],
    ),
    "no memory": (
        "def f(responses): return [len(bytearray(2 ** 32))]",
        ["ran out of memory", "memory_gib = 1", "sample 0"],
    ),
    "not a number": (
        "def f(responses): return [float('nan') if r == 'second' else 1.0 for r in responses]",
        ["returned nan", "sample 1: prompt 'q', response 'second'"],
    ),
    "none": ("def f(responses): return [1.0, None, 2.0]", ["returned None, which is no number", "sample 1"]),
    "nothing": ("def f(responses): pass", ["returned None, not a list of numbers"]),
    "one number": ("def f(responses): return 1.0", ["returned 1.0, not a list of numbers"]),
    "too few": (
        "def f(responses): return [1.0 for r in responses if r != 'second']",
        ["returned 0 scores for 1 responses", "sample 1"],
    ),
    "a string": ("def f(responses): return '1' * len(responses)", ["returned '1', not a list of numbers", "sample 0"]),
    "strings": ("def f(responses): return ['1', '2', '3']", ["returned '1', which is no number", "sample 0"]),
    "a dict": ("def f(responses): return dict.fromkeys(responses, 1.0)", ["{'first': 1.0", "not a list"]),
    "a huge int": ("def f(responses): return [0, 10 ** 400, 0]", ["which is no score", "sample 1"]),
    "beyond float32": ("def f(responses): return [0, 1e308, 0]", ["1e+308, which float32 does not hold", "sample 1"]),
    "another name": ("def f(texts, answers): pass", ["needs a parameter `texts`", "prompts, responses, completions"]),
    "columns it has not": (
        "def f(completions, answer, **kwargs): return [0.0] * len(completions)",
        ["needs a parameter `answer`, which nothing provides", "bound by name"],
    ),
    "a file that does not load": ("import nothing_like_this", ["ModuleNotFoundError", "No module named 'nothing_like"]),
    "a file that exits": ("raise SystemExit(0)", ["raised SystemExit"]),
    "prints megabytes and fails": (
        "def f(responses):\n    print('x' * 2**22)\n    return [None] * len(responses)",
        ["returned None, which is no number", "sample 0"],
    ),
    "forks and returns too many": (
        "import os\ndef f(responses):\n    if not os.fork(): os._exit(0)\n    return [1.0] * 9",
        ["returned 9 scores for 1 responses", "sample 0"],
    ),
}
SLEEPS = "import time\ndef f(response):\n    if response == 'second': time.sleep(1000)\n    return 1.0"


@pytest.fixture
def rewards(tmp_path: Path) -> Any:
    """Makes a reward of the text of a file, and closes it afterwards."""
    made: list[Reward] = []

    def make(text: str, limits: ProcessLimits = LIMITS) -> Reward:
        (tmp_path / "mine.py").write_text(text)
        made.append(Reward(f"{tmp_path / 'mine.py'}:f", limits))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


@pytest.mark.parametrize(("text", "words"), REWARDS.values(), ids=REWARDS.keys())
def test_faulty_rewards_name_the_sample(rewards: Callable[..., Reward], text: str, words: list[str]) -> None:
    with pytest.raises(RewardError) as caught:
        rewards(text)(PROMPTS, RESPONSES)
    said = str(caught.value)
    assert all(word in said for word in words) and len(said) < 2_000, said


def test_a_sample_that_hangs_is_given_up_where_the_run_file_asks_for_it(rewards: Callable[..., Reward]) -> None:
    began = time.monotonic()
    scores = rewards(SLEEPS, replace(LIMITS, seconds=1.0, on_failure="drop"))(PROMPTS, RESPONSES)
    assert scores[::2] == [1.0, 1.0] and math.isnan(scores[1]) and time.monotonic() - began < 60


def test_the_list_is_long_enough() -> None:
    """Forty faults or more, of both kinds."""
    assert len(FILES) >= 20 and len(REWARDS) >= 20 and len(FILES) + len(REWARDS) >= 40
