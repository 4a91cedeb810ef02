"""Reward functions: loading, arguments, processes, limits, and what a failure says."""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from plan_cases import REWARDS
from run_cases import ROOT

from runtime.batches.rewards import ProcessLimits, Reward, RewardError
from runtime.processes.lifetime import STOP_SIGNALS

PROMPTS, RESPONSES = ["p", "q", "r"], ["first", "second", "third one"]
LIMITS = ProcessLimits(seconds=60, memory_gib=1)


@pytest.fixture
def rewards(tmp_path: Path) -> Iterator[object]:
    """Makes a reward of the text of a file, and closes it afterwards."""
    made: list[Reward] = []

    def make(text: str, function: str = "f", limits: ProcessLimits = LIMITS, file: str = "mine.py") -> Reward:
        path = tmp_path / file
        path.write_text(text)
        made.append(Reward(f"{path}:{function}", limits))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def error_of(reward: Reward) -> RewardError:
    with pytest.raises(RewardError) as caught:
        reward(PROMPTS, RESPONSES)
    return pickle.loads(pickle.dumps(caught.value))


@pytest.fixture(scope="module")
def vader() -> Iterator[Reward]:
    reward = Reward("vader", LIMITS)
    yield reward
    reward.close()


def test_vader_orders_texts(vader: Reward) -> None:
    good, neutral, bad = vader(["p"] * 3, ["a wonderful film", "a film", "a horrible boring film"])
    assert good > 0.5 and neutral == 0 and bad < -0.5


def test_function_of_a_module(vader: Reward) -> None:
    reward = Reward("runtime.batches.reward_functions:vader", LIMITS)
    assert reward(["p"], ["good"]) == vader(["p"], ["good"])
    reward.close()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vadar", ["`vadar`", "did you mean `vader`"]),
        ("no.such.module:f", ["`no.such.module:f`", "importing", "PYTHONPATH"]),
        ("nowhere.py:f", ["`nowhere.py:f`", "no such file"]),
        ("runtime.batches.reward_functions:vade", ["no function `vade`", "did you mean `vader`"]),
    ],
)
def test_unknown_names(name: str, words: list[str]) -> None:
    reward = Reward(name, LIMITS)
    with pytest.raises(RewardError) as caught:
        reward.ready()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    reward.close()


LENGTHS = "return [float(len(r)) for r in "
GOOD = {
    "by name, in any order": f"def f(responses, prompts): {LENGTHS}responses]",
    "completions": f"def f(completions): {LENGTHS}completions]",
    "keywords": f"def f(completions, **kwargs):\n    assert set(kwargs) == {{'prompts'}}\n    {LENGTHS}completions]",
    "defaults": f"def f(prompts, responses, scale=1): {LENGTHS}responses]",
    "positional only": f"def f(responses, /): {LENGTHS}responses]",
    "an object": f"class F:\n    def __call__(self, responses): {LENGTHS}responses]\nf = F()",
    "asynchronous": f"async def f(responses): {LENGTHS}responses]",
    "an array": "import numpy as np\ndef f(responses): return np.array([len(r) for r in responses])",
    "a dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Score:\n"
    "    value: float = 0.0\ndef f(responses): return [Score(float(len(r))).value for r in responses]",
    "a pool": "from concurrent.futures import ProcessPoolExecutor\ndef one(r): return float(len(r))\n"
    "def f(responses):\n    with ProcessPoolExecutor(2) as pool: return list(pool.map(one, responses))",
    "a pool that starts anew": "import multiprocessing as mp\ndef one(r): return float(len(r))\n"
    "def f(responses):\n    with mp.get_context('spawn').Pool(1) as pool: return pool.map(one, responses)",
    "what it prints": f"def f(responses):\n    print('words')\n    {LENGTHS}responses]",
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD.keys())
def test_functions_that_work(rewards, text: str) -> None:  # type: ignore[no-untyped-def]
    assert rewards(text)(PROMPTS, RESPONSES) == [5.0, 6.0, 9.0]


def test_modules_beside_the_file_and_a_name_that_python_has(rewards, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "helper_beside.py").write_text("import string\ndef score(r): return string.ascii_letters.count(r[0])")
    text = "from helper_beside import score\ndef f(responses): return [score(r) for r in responses]"
    assert rewards(text, file="string.py")(PROMPTS, RESPONSES) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("policy", ["zero", "drop"])
def test_a_sample_that_fails_has_no_score_where_the_run_goes_on(rewards, policy: str, capfd) -> None:  # type: ignore[no-untyped-def]
    text = "import os\ndef f(response):\n    if response == 'second': os._exit(3)\n    return len(response)"
    scores = rewards(text, limits=replace(LIMITS, on_failure=policy))(PROMPTS, RESPONSES)
    assert scores[::2] == [5.0, 9.0] and math.isnan(scores[1])
    said = capfd.readouterr().err
    assert ("reward: 0 for 'second'" if policy == "zero" else "reward: without 'second'") in said and "ended" in said


def test_failures_are_told_one_by_one_until_there_are_many(rewards, capfd) -> None:  # type: ignore[no-untyped-def]
    text = "def f(response):\n    assert response != 'x', 'no'\n    return 1"
    reward = rewards(text, limits=replace(LIMITS, on_failure="zero"))
    for _ in range(2):
        assert [math.isnan(score) for score in reward(["p"] * 6, [*"xxyxxx"])] == [c == "x" for c in "xxyxxx"]
    said = capfd.readouterr().err.splitlines()
    assert [line.partition(": reward")[0] for line in said] == [
        *["reward: 0 for 'x'"] * 3, "reward: 0 for 2 more of 6 responses, the last 'x'",
        "reward: 0 for 5 more of 6 responses, the last 'x'",
    ]  # fmt: skip


def test_a_function_that_hangs_is_ended_with_all_it_started(rewards, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    text = (
        f"import subprocess, time\nplace = {str(tmp_path / 'child')!r}\n"
        "def f(responses):\n    if 'second' in responses:\n"
        "        open(place, 'w').write(str(subprocess.Popen(['sleep', '1000']).pid))\n        time.sleep(1000)\n"
        "    return [0.0] * len(responses)\n"
    )
    error = error_of(rewards(text, limits=ProcessLimits(seconds=3, memory_gib=1)))
    assert "had not answered after" in error.message and "sample 1: prompt 'q'" in error.message
    assert "reward_limits.seconds = 3" in error.hint and error.sample == 1
    child = Path("/proc", (tmp_path / "child").read_text(), "stat")
    deadline = time.monotonic() + 30
    while child.exists() and child.read_text().rsplit(")", 1)[1].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_slow_is_not_blamed_on_a_sample(rewards) -> None:  # type: ignore[no-untyped-def]
    text = "import time\ndef f(responses):\n    time.sleep(len(responses) ** 3)\n    return [0.0] * len(responses)"
    assert "for 3 responses together" in error_of(rewards(text, limits=ProcessLimits(seconds=6, memory_gib=1))).message


def test_several_processes_keep_the_order_and_the_number_of_a_sample(rewards) -> None:  # type: ignore[no-untyped-def]
    text = (
        "import os\ndef f(responses):\n    assert 'r7' not in responses\n    return [float(r[1:]) for r in responses]"
    )
    reward = rewards(text, limits=ProcessLimits(60, 1, workers=2))
    assert reward(["p"] * 7, [f"r{i}" for i in range(7)]) == [float(i) for i in range(7)]
    with pytest.raises(RewardError, match=r"AssertionError.* sample 7: prompt 'p', response 'r7'"):
        reward(["p"] * 9, [f"r{i}" for i in range(9)])


def test_the_function_is_loaded_once_and_runs_beside_its_caller(rewards) -> None:  # type: ignore[no-untyped-def]
    text = "import os\ncalls = []\ndef f(responses):\n    calls.append(1)\n    return [len(calls)] * len(responses)"
    reward = rewards(text)
    reward.start()
    future = reward.submit(PROMPTS, RESPONSES)
    assert future.result().scores == [1.0] * 3 and future.result().at_s <= time.perf_counter()
    assert reward(PROMPTS, RESPONSES) == [2.0] * 3


def test_a_reward_ends_with_its_rank(rewards) -> None:  # type: ignore[no-untyped-def]
    reader, writer = os.pipe()
    reward = rewards("import os\ndef f(responses): return [os.getpid()] * len(responses)")
    rank = os.fork()
    if not rank:
        os.write(writer, str(int(reward(PROMPTS, RESPONSES)[0])).encode())
        signal.pause()
    worker = int(os.read(reader, 99))
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


def test_signals_to_all_processes_of_a_job_leave_scores(rewards) -> None:  # type: ignore[no-untyped-def]
    reward = rewards("import os\ndef f(responses): return [os.getpid()] * len(responses)")
    worker = int(reward(PROMPTS, RESPONSES)[0])
    for number in STOP_SIGNALS:
        os.kill(worker, number)
        assert reward(PROMPTS, RESPONSES)[0] == worker


@pytest.mark.parametrize("alive", [True, False])
def test_a_process_whose_rank_was_killed_ends_without_a_word(alive: bool) -> None:
    """Its answer meets a pipe that nobody reads, before or after it could see that the rank is gone."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    requests, asks = os.pipe()
    listens, replies = os.pipe()
    os.close(listens)
    parent = os.getpid() if alive else gone.pid
    code = (
        "from runtime.batches.reward_worker import main; "
        f"main({requests}, {replies}, {parent}, 2**33, {{{f'{REWARDS}:vowels'!r}: 1.0}}, ())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], pass_fds=(requests, replies), start_new_session=True, capture_output=True,
        text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    for descriptor in (requests, asks, replies):
        os.close(descriptor)
    assert done.stderr == "" and done.returncode == (-signal.SIGKILL if alive else 0)
