"""Rewards of the tests, in a file of their own: the processes of rewards load it and nothing else."""

from __future__ import annotations


def vowels(prompts: list[str], responses: list[str]) -> list[float]:
    """Share of vowels, a reward that depends on every character."""
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in responses]


def failing(responses: list[str]) -> list[float]:
    """A reward with a mistake in it."""
    raise ZeroDivisionError("no reward today")


def spoiling(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of vowels, but for the prompts that end with `!` a number whose square float32 cannot hold."""
    return [
        3e38 if prompt.endswith("!") else share
        for prompt, share in zip(prompts, vowels(prompts, responses), strict=True)
    ]


def seldom(response: str) -> float:
    """The length of a response, and a mistake in every third one."""
    if len(response) % 3 == 0:
        raise ValueError("no score for this one")
    return float(len(response))


def leaving(responses: list[str]) -> list[float]:
    """A reward that runs what it should not."""
    raise SystemExit(0)


def with_answers(completions: list[str], answer: list[str]) -> list[float]:
    """A reward that reads a column which no data set of the tests has."""
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def rarely(responses: list[str]) -> list[float]:
    """1 for responses whose length is a multiple of three, so that many groups agree."""
    return [float(len(response) % 3 == 0) for response in responses]
