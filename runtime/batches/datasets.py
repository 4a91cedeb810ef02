"""A data set out of files: prompts, given responses, and the columns that rewards read."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from plans.runfile import MOVIE_REVIEWS, Data, DataPart
from runtime.batches.chat import ChatError, ChatTemplate, conversation
from runtime.batches.data import PromptSet, fitting, left_out, movie_review_prompts
from runtime.batches.files import DataError, DataRow, read_data_rows
from runtime.batches.tokenizer import Tokenizer

MESSAGES, ANSWER = "messages", "answer"


@dataclass(frozen=True)
class DataSet:
    """Prompts in their order with what belongs to each.

    asked: what a person asked, without the chat template. responses: given ones, in the order of the algorithm's
    columns. columns: name -> values. special: whether the tokenizer adds its special tokens to prompts. note: what a
    person should know.
    """

    prompts: PromptSet
    asked: tuple[str, ...]
    responses: tuple[tuple[str, ...], ...]
    columns: dict[str, tuple[Any, ...]]
    special: bool
    note: str = ""


@dataclass(frozen=True)
class _Example:
    """A row as it is used."""

    prompt: str
    asked: str
    responses: tuple[str, ...]
    row: DataRow
    chat: bool


class DataReader:
    """Makes examples of rows. responses: names of the given responses that the algorithm needs."""

    def __init__(self, data: Data, responses: Sequence[str], folder: Path) -> None:
        self._data, self._responses, self._folder = data, responses, folder
        self._template: ChatTemplate | None = None

    def examples(self, part: DataPart) -> list[_Example]:
        """The examples of a file or folder. Raises DataError, located."""
        if part.path == MOVIE_REVIEWS and not self._responses:
            rows = [DataRow({"prompt": text}, MOVIE_REVIEWS) for text in movie_review_prompts()]
        else:
            rows = read_data_rows(part.path, self._wanted(part))
        return [self._example(row) for row in rows]

    def _wanted(self, part: DataPart) -> list[str]:
        """Columns that a table must have; conversations may stand in the place of some."""
        named = [self._data.column("prompt"), *(self._data.column(name) for name in self._responses)]
        return named if part.path.endswith(".csv") else []

    def _example(self, row: DataRow) -> _Example:
        column = self._data.column("prompt")
        value = row.values.get(column)
        if value is None and not self._data.prompt and MESSAGES in row.values:
            column, value = MESSAGES, row.values[MESSAGES]
        if not isinstance(value, list) and not self._data.chat:
            text = row.text(column)
            return _Example(text, text, self._given(row), row, chat=False)
        messages = self._messages(row, column, value)
        last = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
        given: tuple[str, ...]
        if last is not None and self._responses == ["response"] and self._data.column("response") not in row.values:
            given, messages = (last,), messages[:-1]
        else:
            given = self._given(row)
        if not messages:
            raise row.error("the conversation has no message before the answer", "a user's message first", column)
        asked = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
        return _Example(self._render(row, messages, column), asked, given, row, chat=True)

    def _messages(self, row: DataRow, column: str, value: Any) -> list[dict[str, Any]]:
        if isinstance(value, list):
            try:
                messages = conversation(value)
            except DataError as error:
                raise row.error(f"`{column}`: {error.message}", error.hint, column) from None
        else:
            messages = [{"role": "user", "content": row.text(column)}]
        if self._data.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._data.system})
        return messages

    def _render(self, row: DataRow, messages: list[dict[str, Any]], column: str) -> str:
        if self._template is None:
            self._template = ChatTemplate.of_folder(self._folder, self._data.template)
        try:
            begun = messages[-1]["role"] == "assistant"
            text = self._template.begun(messages) if begun else self._template.render(messages, generation=True)
            return row.whole(text)
        except ChatError as error:
            raise row.error(error.message, "the template of the tokenizer says what it takes", column) from None

    def _given(self, row: DataRow) -> tuple[str, ...]:
        found = []
        for name in self._responses:
            column = self._data.column(name)
            value = row.values.get(column)
            if isinstance(value, list) and value:  # a conversation, as preference sets hold them: its last message
                value = conversation(value)[-1]["content"]
                found.append(row.whole(value))
            else:
                found.append(row.text(column))
        return tuple(found)


def read_data(
    data: Data, responses: Sequence[str], tokenizer: Tokenizer, folder: Path, *, prompt_tokens: int, batch_size: int,
    seed: int, held_out: int = 0,
) -> tuple[DataSet, DataSet | None]:  # fmt: skip
    """Read what the run file names, but for `held_out` prompts, which the seed draws; and those. Prompts that have no
    token or more than `prompt_tokens` are left out, and counted.

    responses: names of the given responses that the algorithm needs. folder: the tokenizer's, whose chat template is
    used. Raises DataError or ChatError.
    """
    reader, parts, given = DataReader(data, list(responses), folder), list[list[_Example]](), 0
    for part in data.parts:
        examples = reader.examples(part)
        given += len(examples)
        parts.append([*_fitting(examples, tokenizer, prompt_tokens)])
    note = left_out(given, sum(map(len, parts)), prompt_tokens)
    if data.max_prompts and data.max_prompts < sum(map(len, parts)):
        if len(parts) > 1:
            raise DataError("data.max_prompts and several sources", "weights say how much of each is used")
        parts, note = [parts[0][: data.max_prompts]], ""
    apart: list[_Example] = []
    if held_out:
        parts, apart = _without(parts, held_out, seed)
    weights = [part.weight for part in data.parts]
    sizes = tuple((len(part), weight) for part, weight in zip(parts, weights, strict=True))
    order = sizes if any(weight != 1.0 for weight in weights) else ()
    kept = [example for part in parts for example in part]
    set_of = partial(_data_set, data, batch_size=batch_size, seed=seed)
    return set_of(kept, order, note=note), set_of(apart, (), note="") if apart else None


def _without(parts: Sequence[list[_Example]], count: int, seed: int) -> tuple[list[list[_Example]], list[_Example]]:
    """Parts without `count` examples, and those, in their order."""
    total = sum(map(len, parts))
    if count >= total:
        hint = f"evaluation.held_out={max(1, total // 10)}"
        raise DataError(f"evaluation.held_out={count} leaves none of {total} prompts", hint)
    drawn, first = set(random.Random(f"{seed}:held out").sample(range(total), count)), 0
    left, apart = list[list[_Example]](), list[_Example]()
    for part in parts:
        left.append([example for i, example in enumerate(part, first) if i not in drawn])
        apart += [example for i, example in enumerate(part, first) if i in drawn]
        first += len(part)
    return left, apart


def _data_set(
    data: Data, examples: Sequence[_Example], parts: tuple[tuple[int, float], ...], *, batch_size: int, seed: int,
    note: str,
) -> DataSet:  # fmt: skip
    chats = {example.chat for example in examples}
    if len(chats) > 1:
        raise DataError("some prompts are conversations and some are texts", "data.chat=true for all")
    return DataSet(
        PromptSet(tuple(example.prompt for example in examples), batch_size, seed, parts, data.shuffle),
        tuple(example.asked for example in examples),
        tuple(example.responses for example in examples),
        _columns(data, [example.row for example in examples]),
        special=chats != {True},
        note=note,
    )


def _fitting(examples: Sequence[_Example], tokenizer: Tokenizer, prompt_tokens: int) -> Iterable[_Example]:
    special = not any(example.chat for example in examples)
    texts = [example.prompt for example in examples]
    return (examples[index] for index in fitting(texts, tokenizer, prompt_tokens, special=special))


def _columns(data: Data, rows: Sequence[DataRow]) -> dict[str, tuple[Any, ...]]:
    names = dict.fromkeys(name for row in rows for name in row.values)
    columns = {name: tuple(row.values.get(name) for row in rows) for name in names}
    if data.answer:
        if data.answer not in columns:
            raise rows[0].error(f"no column `{data.answer}`", f"data.answer, one of {', '.join(names)}")
        columns[ANSWER] = columns[data.answer]
    return columns
