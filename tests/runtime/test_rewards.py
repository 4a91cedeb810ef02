"""Reward functions: loading, validation, and what a failure says."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from runtime.batches.rewards import Reward, RewardError, load_reward


def test_vader_orders_texts() -> None:
    good, neutral, bad = load_reward("vader")(["p"] * 3, ["a wonderful film", "a film", "a horrible boring film"])
    assert good > 0.5 and neutral == 0 and bad < -0.5


def test_function_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def length(prompts, responses):\n    return [len(p) + len(r) for p, r in zip(prompts, responses)]\n"
    )
    assert load_reward(f"{path}:length")(["a", "bb"], ["x", "yyy"]) == [2.0, 5.0]


def test_function_of_a_module() -> None:
    assert load_reward("runtime.batches.rewards:vader")(["p"], ["good"]) == load_reward("vader")(["p"], ["good"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vadar", ["`vadar`", "did you mean `vader`"]),
        ("no.such.module:f", ["`no.such.module:f`", "importing", "PYTHONPATH"]),
        ("nowhere.py:f", ["`nowhere.py:f`", "no such file"]),
        ("runtime.batches.rewards:vade", ["no function `vade`", "did you mean `vader`"]),
    ],
)
def test_unknown_names(name: str, words: list[str]) -> None:
    with pytest.raises(RewardError) as caught:
        load_reward(name)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([1.0], "1 scores for 2 responses"),
        ([1.0, float("nan")], "returned nan for response 1: 'second'"),
        ([1.0, float("-inf")], "returned -inf for response 1"),
        (None, "returned None, not a list of numbers"),
        (["good", "bad"], "not a list of numbers"),
    ],
)
def test_wrong_results(scores: list[float], words: str) -> None:
    with pytest.raises(RewardError, match=words) as caught:
        Reward("mine.py:f", lambda prompts, responses: scores)(["p", "q"], ["first", "second"])
    assert "reward `mine.py:f`" in str(caught.value)


def test_a_failure_keeps_its_text_and_place(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def broken(prompts, responses):\n    raise KeyError('no score for you')\n")
    with pytest.raises(RewardError) as caught:
        load_reward(f"{path}:broken")(["p"], ["r"])
    text = str(pickle.loads(pickle.dumps(caught.value)))
    assert "mine.py:broken` raised KeyError: 'no score for you'" in text
    assert f"hint: {path}:2" in text


def test_a_file_that_does_not_load(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("import nothing_like_this\n")
    with pytest.raises(RewardError, match="ModuleNotFoundError: No module named 'nothing_like_this'"):
        load_reward(f"{path}:f")
